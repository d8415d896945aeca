"""Entry of the command `quorate-agent`. What it needs is imported inside, where Ctrl-C is seen to."""

from collections.abc import Callable

from quorate_protocol.command import run_command


def main() -> None:
    """Entry point of the console script."""
    run_command("quorate-agent", _load)


def _load() -> Callable[[], object]:
    from quorate_agent.commands import app

    return app
