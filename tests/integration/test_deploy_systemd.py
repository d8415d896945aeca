"""The systemd units: systemd finds nothing wrong, little is exposed, and they say what the programs understand."""

import configparser
import ctypes
import inspect
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from quorate_agent import commands as agent_commands
from quorate_coordinator.settings import load_settings

UNITS = Path(__file__).resolve().parents[2] / "deploy" / "systemd"
NAMES = ["quorate-coordinator.service", "quorate-agent@.service"]
#: Where the units expect the programs.
BIN = "/opt/quorate/bin/"

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


class _Unit(configparser.ConfigParser):
    """A unit file whose keys may repeat: the last value, which is all that is asked for here."""

    def __init__(self, name: str) -> None:
        super().__init__(strict=False, interpolation=None, delimiters=("=",), comment_prefixes=("#",))
        self.optionxform = str  # type: ignore[assignment, method-assign]
        self.read_string((UNITS / name).read_text(encoding="utf-8"))


def as_installed(name: str, directory: Path) -> Path:
    """A copy of the unit that names the programs of this environment: systemd looks whether they are there."""
    text = (UNITS / name).read_text(encoding="utf-8")
    assert BIN in text
    unit = directory / name
    unit.write_text(text.replace(BIN, f"{sys.prefix}/bin/"), encoding="utf-8")
    return unit


def analyze(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = ["systemd-analyze", "--no-pager", *map(str, arguments)]
    return subprocess.run(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60
    )


@needs_systemd
@pytest.mark.parametrize("name", NAMES)
class TestSystemd:
    def test_verify_finds_nothing(self, name: str, tmp_path: Path) -> None:
        done = analyze("verify", "--man=no", as_installed(name, tmp_path))
        assert (done.stdout, done.returncode) == ("", 0)

    @pytest.mark.parametrize(
        ("old", "new", "finding"),
        [
            ("ExecStart=", "ExecStart=/nonexistent", "not executable"),
            ("LockPersonality=", "LockPersonalty=", "Unknown key"),
            ("RestartSec=1", "RestartSec=soon", "Failed to parse"),
        ],
        ids=["program", "key", "value"],
    )
    def test_verify_would_find_something(self, name: str, old: str, new: str, finding: str, tmp_path: Path) -> None:
        unit = as_installed(name, tmp_path)
        text = unit.read_text(encoding="utf-8")
        assert old in text
        unit.write_text(text.replace(old, new), encoding="utf-8")
        done = analyze("verify", "--man=no", unit)
        assert finding in done.stdout

    def test_exposure(self, name: str, tmp_path: Path) -> None:
        # In tenths: 1.5 of 10. What is left is the network, without which there is no service.
        done = analyze("security", "--offline=true", "--threshold=15", as_installed(name, tmp_path))
        assert done.returncode == 0, done.stdout[-400:]
        assert re.search(r"Overall exposure level for quorate-\S+: 1\.\d OK", done.stdout)


class TestWhatTheySay:
    def test_the_coordinator_has_time_to_drain(self) -> None:
        timeout_s = int(_Unit(NAMES[0])["Service"]["TimeoutStopSec"])
        # After the drain come answers and goodbyes, of a few seconds.
        assert timeout_s >= load_settings(UNITS / "coordinator.toml", {"HOME": "/"}).sessions.drain_s + 10

    def test_an_agent_has_time_to_drain(self) -> None:
        timeout_s = int(_Unit(NAMES[1])["Service"]["TimeoutStopSec"])
        assert timeout_s >= inspect.signature(agent_commands.run).parameters["drain_timeout"].default + 10

    def test_exit_codes_that_another_start_does_not_mend(self) -> None:
        assert _Unit(NAMES[0])["Service"]["RestartPreventExitStatus"] == "2"
        hopeless = (agent_commands.EXIT_USAGE, agent_commands.EXIT_REFUSED, agent_commands.EXIT_REPLACED)
        assert _Unit(NAMES[1])["Service"]["RestartPreventExitStatus"] == " ".join(map(str, hopeless))

    def test_the_coordinator_takes_the_token_and_the_state_directory_that_systemd_gives(self) -> None:
        text = (UNITS / NAMES[0]).read_text(encoding="utf-8")
        (variable,) = re.findall(r"(?m)^Environment=(\w+)=%d/token$", text)
        environ = {variable: "/run/credentials/quorate/token", "STATE_DIRECTORY": "/var/lib/quorate"}
        settings = load_settings(UNITS / "coordinator.toml", environ)
        assert settings.auth.token_file == Path("/run/credentials/quorate/token")
        assert settings.state_dir == Path("/var/lib/quorate")

    def test_variables_of_the_agent_are_read_by_its_command(self) -> None:
        text = (UNITS / NAMES[1]).read_text(encoding="utf-8") + (UNITS / "agent.env").read_text(encoding="utf-8")
        for variable in set(re.findall(r"QUORATE_\w+", text)):
            sources = Path(agent_commands.__file__).parent, Path(inspect.getfile(load_settings)).parents[2] / "protocol"
            assert any(variable in path.read_text(encoding="utf-8") for root in sources for path in root.rglob("*.py"))

    def test_the_buffers_are_as_large_as_the_endpoint_asks_for(self) -> None:
        from quorate_protocol.transport.udp import SOCKET_BUFFER_BYTES

        values = re.findall(r"(?m)^net\.core\.[rw]mem_max = (\d+)$", (UNITS / "90-quorate.conf").read_text("utf-8"))
        assert [int(value) for value in values] == [SOCKET_BUFFER_BYTES] * 2


#: prctl(2), since Linux 6.3: what MemoryDenyWriteExecute= forbids.
_PR_SET_MDWE, _PR_MDWE_REFUSE_EXEC_GAIN, _PR_GET_MDWE = 65, 1, 66

_CONFINED = f"""
import ctypes, os, sys
if ctypes.CDLL(None).prctl({_PR_SET_MDWE}, {_PR_MDWE_REFUSE_EXEC_GAIN}, 0, 0, 0) != 0:
    sys.exit("no MDWE")
os.execv(sys.argv[1], sys.argv[1:])
"""


@pytest.mark.skipif(
    ctypes.CDLL(None).prctl(_PR_GET_MDWE, 0, 0, 0, 0) < 0, reason="this kernel cannot deny writable executable memory"
)
def test_the_coordinator_works_without_writable_executable_memory(tmp_path: Path) -> None:
    """As MemoryDenyWriteExecute=yes has it: makes its certificate, serves HTTP, is found by an operator over QUIC."""
    (tmp_path / "coordinator.toml").write_text('listen = "127.0.0.1:0"\nhttp = "127.0.0.1:0"\n', encoding="utf-8")
    environ = {**os.environ, "QUORATE_STATE_DIR": str(tmp_path / "state")}
    log_file = tmp_path / "log"
    confined = [sys.executable, "-c", _CONFINED]
    with log_file.open("wb") as log:
        coordinator = subprocess.Popen(
            [*confined, f"{sys.prefix}/bin/quorate", "coordinator", "--config", str(tmp_path / "coordinator.toml")],
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        started = _wait_for_line(coordinator, log_file, "coordinator_started")
        http = re.findall(r'"http": "([^"]+)"', started)[0]
        listen = re.findall(r'"listen": "127.0.0.1:(\d+)"', started)[0]
        with urllib.request.urlopen(f"http://{http}/readyz", timeout=10) as response:
            assert response.read() == b"ready\n"
        status = subprocess.run(
            [*confined, f"{sys.prefix}/bin/quorate", "status", "--coordinator", f"quic://localhost:{listen}"],
            env=environ,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert status.returncode == 0, status.stderr
        coordinator.send_signal(signal.SIGTERM)
        assert coordinator.wait(30) == 0
    finally:
        if coordinator.poll() is None:
            coordinator.kill()
            coordinator.wait()


def _wait_for_line(process: subprocess.Popen[bytes], log_file: Path, word: str, timeout_s: float = 60.0) -> str:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        for line in log_file.read_text(encoding="utf-8").splitlines(keepends=True):
            if word in line and line.endswith("\n"):
                return line
        assert process.poll() is None, log_file.read_text(encoding="utf-8")
        time.sleep(0.02)
    raise AssertionError(f"no {word} within {timeout_s} s: {log_file.read_text(encoding='utf-8')}")
