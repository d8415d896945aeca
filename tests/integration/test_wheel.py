"""The wheel: what is in it, and that it works with the base dependencies alone, in an environment of its own."""

import importlib.metadata
import re
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

from quorate_protocol import __version__

REPOSITORY = Path(__file__).resolve().parents[2]

# Both need what installs: a build and some downloads, by pip's own configuration.
pytestmark = pytest.mark.timeout(300)


def run(*command: str | Path, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(word) for word in command],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        **options,  # type: ignore[call-overload, no-any-return]
    )


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of what is under version control's roots, so that nothing is left in the checkout."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    for name in ("protocol", "agent", "coordinator"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__", "node_modules"))
    done = run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", target, source)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = target.iterdir()
    return built


class TestContents:
    @pytest.fixture
    def names(self, wheel: Path) -> list[str]:
        with zipfile.ZipFile(wheel) as archive:
            return archive.namelist()

    def test_only_our_packages_at_the_top(self, names: list[str]) -> None:
        packages = {"quorate_protocol", "quorate_agent", "quorate_coordinator"}
        assert {name.split("/")[0] for name in names} == packages | {f"quorate-{__version__}.dist-info"}

    def test_every_module_and_the_type_markers(self, names: list[str]) -> None:
        expected = {
            path.relative_to(root).as_posix()
            for root in (REPOSITORY / "protocol", REPOSITORY / "agent", REPOSITORY / "coordinator")
            for package in root.glob("quorate_*")
            for path in package.rglob("*")
            if path.suffix == ".py" or path.name == "py.typed"
        }
        expected |= {f"quorate_agent/examples/{path.name}" for path in (REPOSITORY / "agent/examples").glob("*.py")}
        shipped = {name for name in names if name.endswith((".py", "py.typed"))}
        assert shipped == expected
        assert {
            f"{package}/py.typed" for package in ("quorate_protocol", "quorate_agent", "quorate_coordinator")
        } <= shipped

    def test_the_license_and_the_commands(self, wheel: Path, names: list[str]) -> None:
        info = f"quorate-{__version__}.dist-info"
        assert f"{info}/licenses/LICENSE" in names
        with zipfile.ZipFile(wheel) as archive:
            scripts = archive.read(f"{info}/entry_points.txt").decode()
            metadata = archive.read(f"{info}/METADATA").decode()
        assert re.findall(r"(?m)^([\w-]+) = ", scripts) == ["quorate", "quorate-agent"]
        assert "License-Expression: Apache-2.0" in metadata
        assert f"Version: {__version__}\n" in metadata

    def test_nothing_of_this_machine(self, wheel: Path) -> None:
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                assert str(REPOSITORY).encode() not in archive.read(name), name


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The commands' directory of a fresh environment with the wheel and the base dependencies."""
    directory = tmp_path_factory.mktemp("environment") / "venv"
    venv.create(directory, with_pip=True)
    pip = [directory / "bin" / "python", "-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet"]
    done = run(*pip, "install", "-c", REPOSITORY / "constraints.txt", wheel)
    assert done.returncode == 0, done.stderr
    return directory / "bin"


class TestInstalled:
    def test_the_base_dependencies_alone(self, installed: Path) -> None:
        done = run(installed / "python", "-c", "import importlib.util as u; print(bool(u.find_spec('river')))")
        assert done.stdout == "False\n"

    @pytest.mark.parametrize("command", ["quorate", "quorate-agent"])
    def test_help_and_version(self, command: str, installed: Path) -> None:
        done = run(installed / command, "--help")
        assert (done.returncode, done.stderr) == (0, "")
        assert command in done.stdout
        assert run(installed / command, "--version").stdout == f"{command} {__version__}\n"

    @pytest.mark.parametrize("command", ["coordinator", "demo"])
    def test_what_needs_the_extra_says_so(self, command: str, installed: Path) -> None:
        done = run(installed / "quorate", command)
        assert (done.returncode, done.stdout) == (2, "")
        (line,) = done.stderr.splitlines()
        assert "[coordinator]" in line
        assert "pip install 'quorate[coordinator]'" in line

    def test_operators_commands_work(self, installed: Path, tmp_path: Path) -> None:
        """As far as they come without a coordinator: options and token are read, the transport is loaded."""
        environ = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "QUORATE_TOKEN": "t"}
        done = run(installed / "quorate", "status", "--coordinator", "quic://", env=environ)
        assert done.returncode == 2
        assert "names no host" in done.stderr
        assert len(done.stderr.splitlines()) == 1

    def test_an_agent_is_loaded(self, installed: Path) -> None:
        (examples,) = installed.parent.glob("lib/python3*/site-packages/quorate_agent/examples")
        done = run(installed / "quorate-agent", "check", f"{examples}/echo.py:agent")
        assert (done.returncode, done.stderr) == (0, "")
        assert "task: echo" in done.stdout

    def test_every_module_of_agents_and_protocol_is_imported(self, installed: Path) -> None:
        script = (
            "import importlib, pkgutil, quorate_agent, quorate_protocol\n"
            "for package in (quorate_agent, quorate_protocol):\n"
            "    for found in pkgutil.walk_packages(package.__path__, package.__name__ + '.'):\n"
            "        if '.examples' not in found.name and not found.name.endswith('__main__'):\n"
            "            importlib.import_module(found.name)\n"
        )
        done = run(installed / "python", "-W", "error", "-c", script)
        assert (done.returncode, done.stderr) == (0, "")


def test_this_environment_has_the_constraints_versions() -> None:
    """What is tested is what is pinned."""
    pinned = dict(
        line.split("==")
        for line in (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
        if "==" in line
    )
    assert all(re.fullmatch(r"[\w.-]+", word) for pin in pinned.items() for word in pin)
    different = {
        name: (version, importlib.metadata.version(name))
        for name, version in pinned.items()
        if importlib.metadata.version(name) != version
    }
    assert different == {}


def test_every_installed_requirement_is_pinned() -> None:
    pinned = re.findall(r"(?m)^([\w.-]+)==", (REPOSITORY / "constraints.txt").read_text(encoding="utf-8"))
    known = {name.lower().replace("_", "-") for name in pinned}
    wanted, seen = ["quorate[coordinator,dev]"], set[str]()
    from packaging.requirements import Requirement

    while wanted:
        requirement = Requirement(wanted.pop())
        name = requirement.name.lower().replace("_", "-")
        for extra in requirement.extras or {""}:
            if f"{name}[{extra}]" in seen:
                continue
            seen.add(f"{name}[{extra}]")
            for text in importlib.metadata.requires(name) or []:
                other = Requirement(text)
                if other.marker is None or other.marker.evaluate({"extra": extra}):
                    wanted.append(str(other))
    names = {entry.split("[")[0] for entry in seen} - {"quorate"}
    assert names - known == set()
