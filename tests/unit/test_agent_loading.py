"""Finding the agent that a command line names."""

import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from quorate_agent.loading import LoadFailed, load_agent, parse_settings, split_target

AGENT = """
from quorate_agent import Agent
agent = Agent("tree-1")
@agent.task("classify")
def classify(body): return body
empty = Agent("empty")
number = 3
class Holder:
    inner = agent
"""

MAKERS = """
from quorate_agent import Agent
seen = {}
def make(depth: int = 3, name: str = "made", *, flag=False):
    seen.update(depth=depth, name=name, flag=flag)
    agent = Agent(name)
    agent.task("classify")(lambda body: body)
    return agent
def needs(path): return make()
def anything(**settings):
    seen.update(settings)
    return make()
def nothing(): return None
def boom(): raise ValueError("first line\\nsecond line")
def leave(): raise SystemExit(3)
"""

_numbers = itertools.count()

Write = Callable[[str], str]


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Write]:
    """Writes a module into the working directory under a name that no other test uses."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    before = set(sys.modules)

    def write_module(text: str) -> str:
        name = f"loading_test_{next(_numbers)}"
        (tmp_path / f"{name}.py").write_text(text)
        return name

    yield write_module
    for name in set(sys.modules) - before:
        if name.startswith(("loading_test_", "quorate_agent_file_")):
            del sys.modules[name]


def test_an_agent_in_a_module_of_the_working_directory(write: Write) -> None:
    name = write(AGENT)
    assert load_agent(f"{name}:agent").name == "tree-1"
    assert load_agent(f"{name}:Holder.inner").name == "tree-1"


def test_an_agent_in_a_package(write: Write, tmp_path: Path) -> None:
    name = write("")
    (tmp_path / f"{name}.py").unlink()
    (tmp_path / name).mkdir()
    (tmp_path / name / "tree.py").write_text(AGENT)
    assert load_agent(f"{name}.tree:agent").name == "tree-1"


def test_an_agent_in_a_file_elsewhere_that_imports_its_neighbour(write: Write, tmp_path: Path) -> None:
    helper = write("PREFIX = 'near'\n")
    folder = tmp_path / "agents"
    folder.mkdir()
    (tmp_path / f"{helper}.py").rename(folder / f"{helper}.py")
    (folder / "loading_test_file.py").write_text(AGENT + f"from {helper} import PREFIX\nassert PREFIX == 'near'\n")
    assert load_agent("agents/loading_test_file.py:agent").name == "tree-1"


def test_a_file_with_the_name_of_a_module_does_not_replace_it(write: Write, tmp_path: Path) -> None:
    write("")
    (tmp_path / "json.py").write_text(AGENT)
    before = sys.modules["json"]
    assert load_agent("json.py:agent").name == "tree-1"
    assert sys.modules["json"] is before


def test_a_function_gets_what_was_set_as_values(write: Write) -> None:
    name = write(MAKERS)
    agent = load_agent(f"{name}:make", {"depth": "7", "name": "12", "flag": "true"})
    assert sys.modules[name].seen == {"depth": 7, "name": "12", "flag": True}
    assert agent.name == "12"
    load_agent(f"{name}:anything", {"x": "[1, 2]", "y": "plain text", "z": "007"})
    assert {key: sys.modules[name].seen[key] for key in "xyz"} == {"x": [1, 2], "y": "plain text", "z": "007"}


@pytest.mark.parametrize(
    ("attribute", "settings", "problem"),
    [
        ("absent", {}, "has no attribute 'absent'"),
        ("seen", {}, "is of type dict; it must be an Agent or a function"),
        ("make", {"size": "1"}, "has no argument 'size'; it takes depth, name, flag"),
        ("needs", {}, "needs the argument 'path': give --set path=VALUE"),
        ("nothing", {}, "returned a NoneType; it must return an Agent"),
        ("nothing", {"x": "1"}, "has no argument 'x'; it takes no arguments"),
        ("boom", {}, r"could not make an agent: ValueError: first line \(.*\.py:14\)$"),
        ("leave", {}, "could not make an agent: SystemExit: 3"),
    ],
)
def test_what_is_wrong_with_a_function_is_told(
    write: Write, attribute: str, settings: dict[str, str], problem: str
) -> None:
    name = write(MAKERS)
    with pytest.raises(LoadFailed, match=problem) as caught:
        load_agent(f"{name}:{attribute}", settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("attribute", "settings", "problem"),
    [
        ("agnet", {}, "has no attribute 'agnet'; it has the agents agent, empty"),
        ("number", {}, "is of type int"),
        ("empty", {}, "the agent has no tasks"),
        ("agent", {"x": "1"}, "is an Agent already"),
    ],
)
def test_what_is_wrong_with_an_attribute_is_told(
    write: Write, attribute: str, settings: dict[str, str], problem: str
) -> None:
    name = write(AGENT)
    with pytest.raises(LoadFailed, match=problem):
        load_agent(f"{name}:{attribute}", settings)


def test_a_missing_module_is_told_from_one_that_misses_something(write: Write) -> None:
    with pytest.raises(LoadFailed, match=r"there is no module 'loading_test_absent\.sub'"):
        load_agent("loading_test_absent.sub:agent")
    name = write("import loading_test_absent_too\n")
    with pytest.raises(LoadFailed, match=rf"{name} cannot be imported: ModuleNotFoundError.*{name}\.py:1\)"):
        load_agent(f"{name}:agent")
    with pytest.raises(LoadFailed, match=r"there is no file absent\.py"):
        load_agent("absent.py:agent")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("x = 1\nraise RuntimeError('broken')\n", r"RuntimeError: broken \(.*:2\)"),
        ("def f(:\n", r"SyntaxError: .*\.py:1\)"),
        ("import sys\nsys.exit(9)\n", "SystemExit: 9"),
    ],
)
def test_a_module_that_fails_is_told_with_the_place(write: Write, text: str, problem: str) -> None:
    name = write(text)
    for target in (f"{name}:agent", f"{name}.py:agent"):
        with pytest.raises(LoadFailed, match=problem) as caught:
            load_agent(target)
        assert caught.value.__cause__ is not None
    assert name not in sys.modules


@pytest.mark.parametrize("target", ["module", ":agent", "module:", "", ":"])
def test_half_a_target_is_explained(target: str) -> None:
    with pytest.raises(LoadFailed, match="is not MODULE:ATTRIBUTE"):
        split_target(target)


def test_settings_are_read_from_pairs() -> None:
    assert parse_settings(["a=1", "b=x=y", "c="], "--set") == {"a": "1", "b": "x=y", "c": ""}
    for wrong, problem in ((["a"], "not NAME=VALUE"), (["=1"], "not NAME=VALUE"), (["a=1", "a=2"], "twice")):
        with pytest.raises(LoadFailed, match=f"--label .*{problem}"):
            parse_settings(wrong, "--label")
