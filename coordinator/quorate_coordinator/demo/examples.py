"""Where the example agents are, and how to load one: they are files, as a user's agents are, never imported by name."""

import importlib.util
import sys
from pathlib import Path
from typing import Any, Final

#: The six classifiers: the agent's name and its file.
CLASSIFIERS: Final[dict[str, str]] = {
    name: f"{name.replace('-', '_')}.py"
    for name in (
        "logistic-regression",
        "hoeffding-tree",
        "gaussian-nb",
        "knn",
        "extremely-fast-decision-tree",
        "adaptive-random-forest",
    )
}

#: The task that they all do.
TASK: Final = "classify"


def examples_directory() -> Path:
    """Where the examples are: inside the installed package, or beside it in a checkout.

    Raises:
        FileNotFoundError: they are in neither place.
    """
    spec = importlib.util.find_spec("quorate_agent")  # finds, does not import
    for package in (spec.submodule_search_locations or ()) if spec else ():
        for directory in (Path(package, "examples"), Path(package).parent / "examples"):
            if (directory / "prequential.py").is_file():
                return directory
    raise FileNotFoundError("the example agents are not installed beside quorate_agent")


def load_example(file: str, **arguments: Any) -> Any:
    """The agent that an example's function `agent` makes of `arguments`.

    Each call runs the file anew. As with `quorate-agent run`, the file finds the modules beside it.
    """
    path = examples_directory() / file
    name = f"quorate_example_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(path)
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(path.parent))
    return module.agent(**arguments)
