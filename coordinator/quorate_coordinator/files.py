"""Writing the files that must last."""

import contextlib
import os
import tempfile
from pathlib import Path


def write_file(path: Path, content: bytes, *, private: bool = False) -> None:
    """Writes a file whole: a reader sees the old one or the new one, also after a crash.

    A private one (mode 0600) is never readable by others, not for a moment. Where a link was put in the
    file's place, it is replaced and not followed.

    Raises:
        OSError: it cannot be written; the old one is as it was.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    aside = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            if not private:
                os.fchmod(file.fileno(), 0o644)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        aside.rename(path)
    except BaseException:
        with contextlib.suppress(OSError):
            aside.unlink()
        raise
