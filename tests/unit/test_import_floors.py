"""Who may import whom. Read from the source with `ast`, so that an import inside a function or under `TYPE_CHECKING`
counts as well."""

import ast
import re
import sys
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
ROOTS = {
    "quorate_protocol": REPOSITORY / "protocol",
    "quorate_agent": REPOSITORY / "agent",
    "quorate_coordinator": REPOSITORY / "coordinator",
}

#: The floors of quorate_protocol, ground first. A module imports from floors below its own, and a package from itself.
FLOORS: list[set[str]] = [
    {"", "limits", "errors", "state_dir", "command"},
    {"frames", "fields", "bodies", "blobs", "credentials", "logs"},
    {"messages"},
    {"transport"},
    {"channel", "pace", "taking", "arguments"},
    {"bulk"},
    {"client"},
]

#: Packages of others that only one place may know.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "aioquic": (
        "quorate_protocol.transport.engine",
        "quorate_protocol.transport.webtransport",
        # The benchmark measures us beside the library as it is; nothing but the benchmark's own processes imports it.
        "quorate_coordinator.bench.transport.stock_side",
    ),
    "river": ("quorate_coordinator.learner",),
    "sqlite3": ("quorate_coordinator.journal",),
    "starlette": ("quorate_coordinator.http",),
    "uvicorn": ("quorate_coordinator.http",),
    "prometheus_client": ("quorate_coordinator.http", "quorate_coordinator.metrics"),
    "pydantic_settings": ("quorate_coordinator.settings",),
}

#: Decisions: pure, so that they can be simulated.
CORES = (
    "quorate_coordinator.rounds",
    "quorate_coordinator.registry",
    "quorate_coordinator.membership",
    "quorate_coordinator.journal.records",
    "quorate_coordinator.learner.fixed_share",
    "quorate_agent.core",
    "quorate_agent.events",
    "quorate_agent.backlog",
    "quorate_protocol.frames",
    "quorate_protocol.bodies",
    "quorate_protocol.fields",
    "quorate_protocol.messages",
    "quorate_protocol.pace",
)
IMPURE = {
    "asyncio", "concurrent", "multiprocessing", "os", "random", "secrets", "select", "selectors", "signal", "socket",
    "sqlite3", "ssl", "subprocess", "threading", "time", "uuid", "aioquic", "river", "structlog",
}  # fmt: skip


class Import(NamedTuple):
    """One import."""

    #: What is imported, dotted.
    target: str
    line: int
    #: Not inside a function.
    at_module_level: bool


@cache
def modules() -> dict[str, Path]:
    """All our modules by their dotted names."""
    found: dict[str, Path] = {}
    for package, root in ROOTS.items():
        for path in (root / package).rglob("*.py"):
            parts = path.relative_to(root).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(module: str) -> list[Import]:
    """What a module imports; of `from a import b` both `a` and, where that is a module of ours, `a.b`."""
    path = modules()[module]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    inner = {
        id(node)
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(function)
    }
    found: list[Import] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: a relative import"
            assert node.module is not None
            submodules = [f"{node.module}.{alias.name}" for alias in node.names]
            targets = [target for target in submodules if target in modules()]
            if len(targets) < len(submodules):
                targets.append(node.module)
        else:
            continue
        found += [Import(target, node.lineno, id(node) not in inner) for target in targets]
    return found


def is_within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def offences(module: str, is_wrong: Callable[[Import], bool]) -> list[str]:
    path = modules()[module].relative_to(REPOSITORY)
    return [f"{path}:{found.line} imports {found.target}" for found in imports(module) if is_wrong(found)]


def with_all_they_import(*packages: str) -> Iterator[str]:
    """Our modules within these packages, and those of ours that they need."""
    seen: set[str] = set()
    wanted = [module for module in modules() if is_within(module, *packages)]
    while wanted:
        module = wanted.pop()
        if module not in seen:
            seen.add(module)
            yield module
            wanted += [found.target for found in imports(module) if found.target in modules()]


#: Modules that may look over the wall between agent and coordinator, and at what.
OVER_THE_WALL: dict[str, tuple[str, ...]] = {
    # The simulation plays a whole fleet in one process: it needs the agent's decisions, and nothing of its shell.
    "quorate_coordinator.simulation": (
        "quorate_agent.core",
        "quorate_agent.events",
        "quorate_agent.backlog",
        "quorate_agent.backoff",
        "quorate_agent.states",
    ),
    # And the same plans with the agent's shell, over the real engine.
    "quorate_coordinator.quic_simulation": ("quorate_agent",),
}


def test_the_walls_between_agent_and_coordinator() -> None:
    wrong: list[str] = []
    for module in modules():
        allowed = [target for user, targets in OVER_THE_WALL.items() if is_within(module, user) for target in targets]
        others = set(ROOTS) - {module.split(".")[0], "quorate_protocol"}

        def is_over(found: Import, others: set[str] = others, allowed: list[str] = allowed) -> bool:
            return is_within(found.target, *others) and not is_within(found.target, *allowed)

        wrong += offences(module, is_over)
    assert wrong == []


#: With models of the shells, and with the shells.
SIMULATIONS = ("quorate_coordinator.simulation", "quorate_coordinator.quic_simulation")


def test_only_the_command_imports_the_simulation() -> None:
    """What runs in production must not come to need the simulation, and the agent's package with it."""
    wrong = [
        offence
        for module in modules()
        if not is_within(module, *SIMULATIONS, "quorate_coordinator.cli.simulate_command")
        for offence in offences(module, lambda found: is_within(found.target, *SIMULATIONS))
    ]
    assert wrong == []


def test_the_simulation_knows_no_clock_but_its_own() -> None:
    """What it does depends on the plan alone. How long that takes is measured where a run begins and ends, and one
    module puts its time of day in the place of the real one."""
    timed = tuple(f"quorate_coordinator.simulation.{name}" for name in ("run", "shorten", "wall_clock"))
    wrong: list[str] = []
    for module in modules():
        if is_within(module, "quorate_coordinator.simulation"):
            impure = IMPURE - {"random"} - ({"time"} if module in timed else set())

            def is_impure(found: Import, impure: set[str] = impure) -> bool:
                return found.target.split(".")[0] in impure

            wrong += offences(module, is_impure)
    assert wrong == []


def floor_of(name: str) -> int:
    """The floor of a module or package directly under quorate_protocol."""
    (floor,) = [number for number, names in enumerate(FLOORS) if name in names] or [None]
    assert floor is not None, f"quorate_protocol.{name} needs a floor in this test"
    return floor


def test_the_floors_of_the_protocol() -> None:
    wrong: list[str] = []
    for module in modules():
        if is_within(module, "quorate_protocol"):
            name = module.partition(".")[2].partition(".")[0]

            def is_upward(found: Import, name: str = name) -> bool:
                if not is_within(found.target, "quorate_protocol"):
                    return False
                other = found.target.partition(".")[2].partition(".")[0]
                return other != name and floor_of(other) >= floor_of(name)

            wrong += offences(module, is_upward)
    assert wrong == []


@pytest.mark.parametrize("package", ONLY_IN)
def test_what_only_one_place_knows(package: str) -> None:
    wrong = [
        offence
        for module in modules()
        if not is_within(module, *ONLY_IN[package])
        for offence in offences(module, lambda found: is_within(found.target, package))
    ]
    assert wrong == []


@pytest.mark.parametrize("core", CORES)
def test_cores_are_pure_with_all_that_they_import(core: str) -> None:
    assert any(is_within(module, core) for module in modules()), f"there is no {core}"
    wrong = [
        offence
        for module in with_all_they_import(core)
        for offence in offences(module, lambda found: found.target.split(".")[0] in IMPURE)
    ]
    assert wrong == []


def base_packages() -> set[str]:
    """What can be imported where no extra is installed."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    required = {re.split(r"[^\w.-]", text)[0].replace("-", "_") for text in project["dependencies"]}
    # cryptography comes with aioquic, rich with typer.
    return required | {"cryptography", "rich"} | set(sys.stdlib_module_names) | set(ROOTS)


def test_agents_and_the_protocol_need_the_base_dependencies_alone() -> None:
    allowed = base_packages()
    wrong = [
        offence
        for module in modules()
        if is_within(module, "quorate_protocol", "quorate_agent")
        for offence in offences(
            module,
            # NumPy is imported when somebody sends an array.
            lambda found: found.target.split(".")[0] not in (allowed if found.at_module_level else allowed | {"numpy"}),
        )
    ]
    assert wrong == []


def test_commands_can_be_listed_with_the_base_dependencies_alone() -> None:
    """`quorate status` must work where the extra is not installed: the commands import what needs it when they run."""
    allowed = base_packages()
    seen: set[str] = set()
    wanted = ["quorate_coordinator.cli.app"]
    wrong: list[str] = []
    while wanted:
        module = wanted.pop()
        if module not in seen:
            seen.add(module)
            wrong += offences(module, lambda found: found.at_module_level and found.target.split(".")[0] not in allowed)
            wanted += [one.target for one in imports(module) if one.at_module_level and one.target in modules()]
    assert wrong == []
    assert len(seen) > 5


def test_source_roots_are_no_packages() -> None:
    """A package called `agent` or `protocol` in site-packages would collide with users' own."""
    for root in ROOTS.values():
        assert not (root / "__init__.py").exists()
