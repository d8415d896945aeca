"""How often a long-running process of ours looks for garbage in cycles."""

import gc
from typing import Final

#: Container objects that may be made before the youngest are looked at. CPython's default of 700 is a few
#: messages' worth: a process that handles thousands of them a second spends a tenth of its time looking.
_YOUNG_MAX: Final = 20_000


def relax_collector() -> None:
    """Looks less often, and never again at what exists now (modules, models' classes): it will not go.

    Reference counting frees all but cycles as before. Call it once, when the process is set up.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_YOUNG_MAX, 20, 20)
