"""`quorate coordinator`, `demo`, `bench`: what needs the extra [coordinator]."""

import asyncio
import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quorate_coordinator.cli import common
from quorate_protocol.errors import ConfigurationError
from quorate_protocol.garbage import relax_collector

if TYPE_CHECKING:
    from quorate_coordinator.bench.result import Result

bench = typer.Typer(
    help="Measure Quorate on this machine.",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

JsonFileOption = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the rows to this file as JSON.")
]

PictureOption = Annotated[
    Path | None, typer.Option("--picture", metavar="FILE.png", help="Also draw the rows into this file.")
]
OnlyOption = Annotated[
    list[str] | None,
    typer.Option("--only", metavar="TEXT", help="Only rows with this in their name. Repeatable."),
]
QuickOption = Annotated[
    bool, typer.Option("--quick", help="So little of everything that the numbers say little, in half a minute.")
]


def coordinator(
    config: Annotated[
        Path | None,
        typer.Option(metavar="FILE", envvar="QUORATE_CONFIG", help="Settings, in TOML. Without it: the defaults."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Check the settings and the files they name, print them, and exit.")
    ] = False,
) -> None:
    """Run the coordinator until SIGTERM or SIGINT, which drain it.

    Every setting can also come from the environment, such as QUORATE_ROUNDS__DEADLINE_S for deadline_s
    in [rounds]; the environment goes over the file.
    """
    common.require_extra("coordinator")
    from quorate_coordinator.preflight import check_files
    from quorate_coordinator.settings import load_settings
    from quorate_protocol import logs

    with _settings_errors_shown(config):
        settings = load_settings(config, os.environ)
        if check:
            check_files(settings)
            common.print_json(settings.model_dump(mode="json"))
            return
    from quorate_coordinator.daemon import run_daemon  # with the learner, which takes a second to import

    with _settings_errors_shown(config):
        logs.configure(settings.log.level, settings.log.format)
        relax_collector()
        code = asyncio.run(run_daemon(settings))
    raise typer.Exit(code)


@contextlib.contextmanager
def _settings_errors_shown(config: Path | None) -> Iterator[None]:
    """As `common.errors_shown`; what is wrong with a setting, with the file that it may be from."""
    with common.errors_shown():
        try:
            yield
        except ConfigurationError as error:
            is_named = config is None or str(error).startswith(f"{config}: ")
            common.fail(str(error) if is_named else f"{config}: {error}", common.EXIT_USAGE)


def demo(
    dataset: Annotated[
        str, typer.Option(metavar="NAME", help="image-segments, phishing, bananas or shuttle.")
    ] = "image-segments",
    limit: Annotated[
        int | None, typer.Option(metavar="N", help="Only the first N instances.", min=1, max=common.COUNT_MAX)
    ] = None,
    seed: Annotated[int, typer.Option(metavar="N", help="Of the models that draw at random.", min=0)] = 42,
    json_output: common.JsonOption = False,
    serve: Annotated[
        bool, typer.Option("--serve", help="Stay up after the run, so that metrics and status can be looked at.")
    ] = False,
    listen: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="UDP address of the coordinator; port 0 is any.")
    ] = "127.0.0.1:0",
    http: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="TCP address of /metrics; port 0 is any.")
    ] = "127.0.0.1:0",
) -> None:
    """One coordinator, six agents, real data: who is right, how often, and how fast.

    Starts a coordinator and six River models, each a process of its own, and feeds them a data set:
    each instance is asked first and its label revealed after.
    """
    common.require_extra("coordinator")
    from quorate_coordinator.demo.run import run_demo

    with _demo_errors_shown():
        asyncio.run(
            run_demo(
                dataset,
                limit=limit,
                seed=seed,
                json_output=json_output,
                serve=serve,
                listen=listen,
                http=http,
            )
        )


@contextlib.contextmanager
def _demo_errors_shown() -> Iterator[None]:
    """As `common.errors_shown`; when a process of the demo has ended, with the end of its log."""
    from quorate_coordinator.demo.processes import DemoFailed

    with common.errors_shown():
        try:
            yield
        except DemoFailed as error:
            if error.log_tail:
                typer.echo(error.log_tail, err=True)
            raise


@contextlib.contextmanager
def _bench_errors_shown() -> Iterator[None]:
    """As `common.errors_shown`; when a process of a benchmark has failed, with the end of its log."""
    from quorate_coordinator.bench.transport.children import BenchFailed

    with common.errors_shown():
        try:
            yield
        except BenchFailed as error:
            if error.log_tail:
                typer.echo(error.log_tail, err=True)
            raise


@bench.command("coordination")
def bench_coordination(
    instances: Annotated[
        int, typer.Option(metavar="N", help="Rounds to measure.", min=10, max=common.COUNT_MAX)
    ] = 1000,
    json_file: JsonFileOption = None,
) -> None:
    """Coordination overhead of a round with six agents: its time less the slowest agent's own compute."""
    common.require_extra("coordinator")
    from quorate_coordinator.bench.coordination import measure_coordination
    from quorate_coordinator.bench.report import show

    with _demo_errors_shown():
        _check_bench(json_file, None, None)
        show(asyncio.run(measure_coordination(instances)), json_file)


@bench.command("transport")
def bench_transport(
    json_file: JsonFileOption = None,
    picture_file: PictureOption = None,
    only: OnlyOption = None,
    seconds: Annotated[
        float | None,
        typer.Option("--seconds", metavar="S", help="How long one bulk transfer lasts; 0.8.", min=0.05, max=30.0),
    ] = None,
    quick: QuickOption = False,
) -> None:
    """Quorate's transport beside stock aioquic's asyncio API: two processes each, over loopback, in turn.

    Takes about two minutes. Only loopback is used, and ports that the kernel chooses.
    """
    common.require_extra("coordinator")
    if picture_file is not None:
        common.require_extra("bench", "a picture")
    from quorate_coordinator.bench.report import showing_progress
    from quorate_coordinator.bench.transport.plan import QUICK, plan
    from quorate_coordinator.bench.transport.run import measure_transport

    with _bench_errors_shown():
        if quick and seconds is not None:
            raise ConfigurationError("--seconds", "says how long; --quick says so, too: only one of them")
        _check_bench(json_file, picture_file, only)
        with showing_progress("bench transport") as progress:
            result = asyncio.run(measure_transport(QUICK if quick else plan(seconds or 0.8), only or [], progress))
        _show_bench(result, json_file, picture_file)


@bench.command("rounds")
def bench_rounds(
    json_file: JsonFileOption = None,
    picture_file: PictureOption = None,
    only: OnlyOption = None,
    quick: QuickOption = False,
) -> None:
    """Rounds per second and their times with 6, 50 and 200 agents, with a journal and without, in turn.

    A coordinator of each kind, echo agents, one and sixteen rounds in flight; every round waits for all its agents.
    Takes about two minutes. The journal is where TMPDIR says: what a commit costs depends on the disk there.
    """
    common.require_extra("coordinator")
    if picture_file is not None:
        common.require_extra("bench", "a picture")
    from quorate_coordinator.bench.report import showing_progress
    from quorate_coordinator.bench.rounds.plan import QUICK, WHOLE
    from quorate_coordinator.bench.rounds.run import measure_rounds

    with _demo_errors_shown():
        _check_bench(json_file, picture_file, only)
        relax_collector()
        with showing_progress("bench rounds") as progress:
            result = asyncio.run(measure_rounds(QUICK if quick else WHOLE, only or [], progress))
        _show_bench(result, json_file, picture_file)


@bench.command("bodies")
def bench_bodies(
    json_file: JsonFileOption = None,
    picture_file: PictureOption = None,
    size_mib: Annotated[
        int,
        typer.Option("--size", metavar="MIB", help="How large the body is; 16 to 4000.", min=16, max=4000),
    ] = 1024,
    agents: Annotated[
        int, typer.Option("--agents", metavar="N", help="How many are asked it at once, in one process.", min=1, max=64)
    ] = 1,
    quick: Annotated[
        bool, typer.Option("--quick", help="Once instead of three times: the numbers say little.")
    ] = False,
) -> None:
    """Small rounds alone and beside one large body each way, and how much each process grows.

    One agent is asked a body and gives it back, another is asked a small question every ten milliseconds; then the
    same beside three processes that move as many bytes by TLS over TCP, which tells what is due to busy processors.
    Takes some two minutes for 1024 MiB, and twice as much disk where TMPDIR says.
    """
    common.require_extra("coordinator")
    if picture_file is not None:
        common.require_extra("bench", "a picture")
    from quorate_coordinator.bench.bodies import plan
    from quorate_coordinator.bench.bodies.run import measure_bodies
    from quorate_coordinator.bench.report import showing_progress

    with _demo_errors_shown():
        _check_bench(json_file, picture_file, None)
        relax_collector()
        if size_mib * agents > plan.MIB_MAX:
            raise ConfigurationError(
                "--size", f"for {agents} agents it may be {plan.MIB_MAX // agents}, got {size_mib}"
            )
        chosen = (plan.quick if quick else plan.whole)(size_mib << 20, agents)
        with showing_progress("bench bodies") as progress:
            result = asyncio.run(measure_bodies(chosen, progress))
        _show_bench(result, json_file, picture_file)


def _check_bench(json_file: Path | None, picture_file: Path | None, only: list[str] | None) -> None:
    """Before minutes of measuring, rather than after.

    Raises:
        ConfigurationError: an option is wrong.
    """
    from quorate_coordinator.bench.report import check_writable

    if only is not None and not all(text.strip() for text in only):
        raise ConfigurationError("--only", "is empty; give a part of a row's name, such as --only p50")
    if json_file is not None and json_file == picture_file:
        raise ConfigurationError("--picture", f"{picture_file} is where --json is written to")
    check_writable("--json", json_file)
    check_writable("--picture", picture_file)
    if picture_file is not None:
        from quorate_coordinator.bench.picture import check_format

        check_format(picture_file)


def _show_bench(result: "Result", json_file: Path | None, picture_file: Path | None) -> None:
    from quorate_coordinator.bench.report import show

    show(result, json_file)
    if picture_file is None:
        typer.echo("--picture FILE.png draws it, --json FILE keeps the numbers", err=True)
    else:
        from quorate_coordinator.bench.picture import draw

        draw(result, picture_file)
