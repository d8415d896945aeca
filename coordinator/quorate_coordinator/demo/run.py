"""The demo: starts the processes, feeds them, shows the result, ends the processes."""

import asyncio
import contextlib
import tempfile
import time
from collections.abc import AsyncGenerator, AsyncIterator
from pathlib import Path
from typing import Any, Final

import typer

from quorate_coordinator.cli.common import print_json
from quorate_coordinator.demo.examples import CLASSIFIERS, TASK, examples_directory
from quorate_coordinator.demo.processes import (
    Processes,
    clean_environ,
    reachable,
    ready_socket,
    unless_one_ends,
    wait_joined,
    wait_ready,
)
from quorate_coordinator.feeding.report import LiveProgress, print_report
from quorate_coordinator.feeding.run import AskOptions, feed
from quorate_coordinator.feeding.tally import Tally
from quorate_coordinator.learner.datasets import DATASETS, instances
from quorate_coordinator.sigterm import raised_by_sigterm
from quorate_protocol.client import Client
from quorate_protocol.credentials import find_ca, find_token
from quorate_protocol.errors import ConfigurationError
from quorate_protocol.transport import ClientTls

#: The agents work, the coordinator coordinates: where both share processors, an agent that is woken must not hold
#: up the one that was about to wake the next. (As in the agents' systemd unit.)
_AGENT_NICENESS: Final = 5

#: A round of the demo waits this long for a model, so that no prediction depends on timing.
_DEADLINE_S: Final = 120.0


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
    client: Client, processes: Processes, dataset: str, limit: int | None, *, title: str, quiet: bool
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
        await unless_one_ends(feeding, processes)
    return tally, time.monotonic() - began


async def _labelled(dataset: str, limit: int | None) -> AsyncGenerator[tuple[Any, Any, bool], None]:
    for features, label in instances(dataset, limit):
        yield features, label, True


@contextlib.asynccontextmanager
async def _fleet(
    dataset: str, *, seed: int, listen: str, http: str, quiet: bool
) -> AsyncIterator[tuple[Client, Processes, str]]:
    """A coordinator and the six agents, each a process, with a client connected to them.

    Raises:
        ConfigurationError: there is no such data set.
        DemoFailed: a process did not start or ended early.
    """
    if dataset not in DATASETS:
        raise ConfigurationError("--dataset", f"{dataset!r} is none of {', '.join(DATASETS)}")
    with raised_by_sigterm(), tempfile.TemporaryDirectory(prefix="quorate-demo-") as name:
        directory = Path(name)
        processes = Processes(directory)
        env = clean_environ(QUORATE_STATE_DIR=str(directory / "state"))
        try:
            if not quiet:
                typer.echo("starting a coordinator and six agents ...", err=True)
            with ready_socket(directory) as (ready, notify_env):
                settings = {"QUORATE_LISTEN": listen, "QUORATE_HTTP": http, "QUORATE_ROUNDS__DEADLINE_S": "120"}
                await processes.start(
                    "coordinator", "-m", "quorate_coordinator", "coordinator", env={**env, **notify_env, **settings}
                )
                addresses = await wait_ready(ready, processes)
            url = f"quic://{reachable(addresses['X_QUORATE_LISTEN'])}"
            multiclass = "true" if DATASETS[dataset].multiclass else "false"
            for agent, file in CLASSIFIERS.items():
                await processes.start(
                    agent,
                    *("-m", "quorate_agent", "run", f"{examples_directory() / file}:agent"),
                    *("--id", agent, "--coordinator", url),
                    *("--set", f"seed={seed}", "--set", f"multiclass={multiclass}"),
                    env=env,
                    niceness=_AGENT_NICENESS,
                )
            async with await Client.connect(
                url, token=find_token(environ=env), tls=ClientTls(find_ca(environ=env)), name="demo"
            ) as client:
                await wait_joined(client, CLASSIFIERS, processes)
                yield client, processes, _where(url, addresses["X_QUORATE_HTTP"], env["QUORATE_STATE_DIR"])
        finally:
            await processes.stop()


def _where(url: str, http: str, state_dir: str) -> str:
    metrics = f"  metrics  http://{reachable(http)}/metrics\n" if http else ""
    return (
        f"\nserving until Ctrl-C\n{metrics}  status   QUORATE_STATE_DIR={state_dir} quorate status --coordinator {url}"
    )
