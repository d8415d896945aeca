"""The demo: starts the processes, feeds them, shows the result, ends the processes."""

import asyncio
import contextlib
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from pathlib import Path
from typing import Any, Final

import typer

from quorate_coordinator.cli.common import print_json
from quorate_coordinator.demo.examples import CLASSIFIERS, TASK, examples_directory
from quorate_coordinator.feeding.report import LiveProgress, print_report
from quorate_coordinator.feeding.run import AskOptions, feed
from quorate_coordinator.feeding.tally import Tally
from quorate_coordinator.learner.datasets import DATASETS, instances
from quorate_coordinator.sigterm import raised_by_sigterm
from quorate_protocol.client import Client
from quorate_protocol.credentials import find_ca, find_token
from quorate_protocol.errors import ConfigurationError, QuorateError
from quorate_protocol.transport import ClientTls
from quorate_protocol.transport.address import join_host_port, parse_listen_address

#: How long the processes may take to be ready, in seconds: six imports of River on two cores.
_START_TIMEOUT_S: Final = 90.0

#: How long a process may take to end after SIGTERM, in seconds.
_STOP_TIMEOUT_S: Final = 15.0

#: The agents work, the coordinator coordinates: where both share processors, an agent that is woken must not hold
#: up the one that was about to wake the next. (As in the agents' systemd unit.)
_AGENT_NICENESS: Final = 5

#: A round of the demo waits this long for a model, so that no prediction depends on timing.
_DEADLINE_S: Final = 120.0


#: Runs its arguments if the process with the number in $0 is the parent.
_UNLESS_ORPHANED: Final = '[ "$PPID" = "$0" ] && exec "$@"'


class DemoFailed(QuorateError):
    """A process of the demo did not start or ended early. `log_tail` has the end of its log."""

    def __init__(self, problem: str, log_tail: str = "") -> None:
        super().__init__(problem)
        self.log_tail = log_tail


class _Processes:
    """The demo's processes and their logs."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._processes: dict[str, asyncio.subprocess.Process] = {}

    async def start(self, name: str, *arguments: str, env: dict[str, str], niceness: int = 0) -> None:
        """Starts `python -m ARGUMENTS`; its output goes to a file."""
        command = [sys.executable, "-m", *arguments]
        if setpriv := shutil.which("setpriv"):
            # When this process is killed, the kernel ends the others. One that began only after it was killed is
            # not told any more, and finds another parent.
            command = [setpriv, "--pdeathsig", "TERM", "sh", "-c", _UNLESS_ORPHANED, str(os.getpid()), *command]
        with (self._directory / f"{name}.log").open("wb") as output:
            self._processes[name] = await asyncio.create_subprocess_exec(
                *command,
                env=env,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        if niceness:
            with contextlib.suppress(OSError):
                os.setpriority(os.PRIO_PROCESS, self._processes[name].pid, niceness)

    def check(self) -> None:
        """Raises:
        DemoFailed: one of them has ended.
        """
        for name, process in self._processes.items():
            if process.returncode is not None:
                problem = f"{name} ended with exit code {process.returncode}; the end of its log is above"
                raise DemoFailed(problem, self._tail(name))

    async def watch(self) -> None:
        """Returns never.

        Raises:
            DemoFailed: one of them has ended.
        """
        waits = [asyncio.create_task(process.wait()) for process in self._processes.values()]
        try:
            await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for wait in waits:
                wait.cancel()
        self.check()

    async def stop(self) -> None:
        """Ends them all: asks first, then insists."""
        for process in reversed(self._processes.values()):
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.terminate()
        for process in self._processes.values():
            try:
                async with asyncio.timeout(_STOP_TIMEOUT_S):
                    await process.wait()
            except TimeoutError:
                process.kill()
                await process.wait()

    def _tail(self, name: str) -> str:
        lines = (self._directory / f"{name}.log").read_text(errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in lines[-15:]) or "  (nothing)"


async def run_demo(
    dataset: str,
    *,
    limit: int | None,
    seed: int,
    json_output: bool,
    serve: bool,
    listen: str,
    http: str,
) -> None:
    """The whole demo; see `quorate demo --help`.

    Raises:
        ConfigurationError: there is no such data set.
        DemoFailed: a process did not start or ended early.
    """
    async with _fleet(dataset, seed=seed, listen=listen, http=http, quiet=json_output) as (client, processes, where):
        tally, elapsed_s = await _feed(client, processes, dataset, limit, title=dataset, quiet=json_output)
        if json_output:
            print_json({"dataset": dataset, **tally.as_json(elapsed_s)})
        else:
            print_report(dataset, tally, elapsed_s)
        if serve:
            typer.echo(where, err=True)
            with contextlib.suppress(asyncio.CancelledError):  # Ctrl-C is how this ends
                await processes.watch()


async def run_fleet(dataset: str, *, limit: int | None, seed: int, title: str) -> tuple[Tally, float]:
    """The demo without its report: what was counted, and the seconds that it took.

    Raises: as `run_demo`.
    """
    async with _fleet(dataset, seed=seed, listen="127.0.0.1:0", http="127.0.0.1:0", quiet=False) as (
        client,
        processes,
        _,
    ):
        return await _feed(client, processes, dataset, limit, title=title, quiet=False)


async def _feed(
    client: Client, processes: _Processes, dataset: str, limit: int | None, *, title: str, quiet: bool
) -> tuple[Tally, float]:
    tally = Tally()
    total = min(limit or DATASETS[dataset].instances, DATASETS[dataset].instances)
    began = time.monotonic()
    with LiveProgress(title, tally, total, quiet=quiet) as progress:
        feeding = asyncio.ensure_future(
            feed(
                client,
                TASK,
                _labelled(dataset, limit),
                tally,
                # All six, always: who is slow today must not change what is predicted.
                options=AskOptions(grace_s=_DEADLINE_S, deadline_s=_DEADLINE_S),
                on_outcome=lambda outcome: progress.update(),
            )
        )
        await _unless_one_ends(feeding, processes)
    return tally, time.monotonic() - began


async def _labelled(dataset: str, limit: int | None) -> AsyncGenerator[tuple[Any, Any, bool], None]:
    for features, label in instances(dataset, limit):
        yield features, label, True


@contextlib.asynccontextmanager
async def _fleet(
    dataset: str, *, seed: int, listen: str, http: str, quiet: bool
) -> AsyncIterator[tuple[Client, _Processes, str]]:
    """A coordinator and the six agents, each a process, with a client connected to them.

    Raises:
        ConfigurationError: there is no such data set.
        DemoFailed: a process did not start or ended early.
    """
    if dataset not in DATASETS:
        raise ConfigurationError("--dataset", f"{dataset!r} is none of {', '.join(DATASETS)}")
    with raised_by_sigterm(), tempfile.TemporaryDirectory(prefix="quorate-demo-") as name:
        directory = Path(name)
        processes = _Processes(directory)
        # Whatever this shell has set for other coordinators is not meant for this one.
        env = {key: value for key, value in os.environ.items() if not key.startswith("QUORATE_")}
        env["QUORATE_STATE_DIR"] = str(directory / "state")
        try:
            if not quiet:
                typer.echo("starting a coordinator and six agents ...", err=True)
            with _ready_socket(directory) as (ready, notify_env):
                settings = {"QUORATE_LISTEN": listen, "QUORATE_HTTP": http, "QUORATE_ROUNDS__DEADLINE_S": "120"}
                await processes.start(
                    "coordinator", "quorate_coordinator", "coordinator", env={**env, **notify_env, **settings}
                )
                addresses = await _wait_ready(ready, processes)
            url = f"quic://{_reachable(addresses['X_QUORATE_LISTEN'])}"
            multiclass = "true" if DATASETS[dataset].multiclass else "false"
            for agent, file in CLASSIFIERS.items():
                await processes.start(
                    agent,
                    *("quorate_agent", "run", f"{examples_directory() / file}:agent"),
                    *("--id", agent, "--coordinator", url),
                    *("--set", f"seed={seed}", "--set", f"multiclass={multiclass}"),
                    env=env,
                    niceness=_AGENT_NICENESS,
                )
            async with await Client.connect(
                url, token=find_token(environ=env), tls=ClientTls(find_ca(environ=env)), name="demo"
            ) as client:
                await _wait_joined(client, processes)
                yield client, processes, _where(url, addresses["X_QUORATE_HTTP"], env["QUORATE_STATE_DIR"])
        finally:
            await processes.stop()


@contextlib.contextmanager
def _ready_socket(directory: Path) -> Iterator[tuple[socket.socket, dict[str, str]]]:
    """Where the coordinator says that it is ready, as it does to systemd."""
    path = str(directory / "ready")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(path)
        sock.setblocking(False)
        yield sock, {"NOTIFY_SOCKET": path}


async def _wait_ready(ready: socket.socket, processes: _Processes) -> dict[str, str]:
    receiving = asyncio.ensure_future(asyncio.get_running_loop().sock_recv(ready, 4096))
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            text = await _unless_one_ends(receiving, processes)
    except TimeoutError:
        raise DemoFailed(f"the coordinator was not ready within {_START_TIMEOUT_S:g} s") from None
    return dict(line.split("=", 1) for line in text.decode().splitlines())


async def _wait_joined(client: Client, processes: _Processes) -> None:
    try:
        async with asyncio.timeout(_START_TIMEOUT_S):
            while True:
                fleet = await client.agents()
                if {agent.agent for agent in fleet.agents if agent.state == "connected"} >= set(CLASSIFIERS):
                    return
                processes.check()
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise DemoFailed(f"the agents had not joined within {_START_TIMEOUT_S:g} s") from None


async def _unless_one_ends(work: "asyncio.Future[Any]", processes: _Processes) -> Any:
    """The result of `work`, or what a process's early end raises."""
    watching = asyncio.ensure_future(processes.watch())
    try:
        await asyncio.wait((work, watching), return_when=asyncio.FIRST_COMPLETED)
        if watching.done() and not work.done():
            watching.result()
        return await work
    finally:
        for future in (work, watching):
            future.cancel()
        await asyncio.wait((work, watching))


def _reachable(listen: str) -> str:
    """The address at which this machine reaches what listens there: "every interface" is no destination."""
    host, port = parse_listen_address(listen)
    return join_host_port({"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host), port)  # noqa: S104  compared, not bound


def _where(url: str, http: str, state_dir: str) -> str:
    metrics = f"  metrics  http://{_reachable(http)}/metrics\n" if http else ""
    return (
        f"\nserving until Ctrl-C\n{metrics}  status   QUORATE_STATE_DIR={state_dir} quorate status --coordinator {url}"
    )
