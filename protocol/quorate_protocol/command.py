"""What every command has in common with a terminal: Ctrl-C, standard streams that are closed, full or not Unicode.

It imports next to nothing, because it must stand before the modules of a command are imported, which takes a while.
"""

import codecs
import contextlib
import io
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, Final, NoReturn

EXIT_OTHER: Final = 1
#: What a shell reports of a process that SIGINT ended.
EXIT_INTERRUPTED: Final = 128 + signal.SIGINT

#: Name of the error handler for characters that an encoding does not have.
_ESCAPE: Final = "quorate-escape"


def run_command(name: str, load: Callable[[], Callable[[], object]]) -> None:
    """Runs the command that `load` imports; the exit code is raised as SystemExit.

    Ctrl-C ends the process at once, in one line, but for what runs within `interruptible`. What standard output cannot
    take ends the command in one line, too, and with exit code 1.
    """
    output = _prepare_streams()
    # Where SIGINT is ignored, as in a shell's background, that stays so.
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _End(name))
    try:
        load()()
    finally:
        _end_output(name, output)


@contextlib.contextmanager
def interruptible() -> Iterator[None]:
    """In a command, Ctrl-C raises KeyboardInterrupt here, for what has something to tidy up. Not around imports."""
    before = signal.getsignal(signal.SIGINT)
    if not isinstance(before, _End):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


class _End:
    """Handler of SIGINT that ends the process.

    Not by an exception: in the middle of an import that may be wrapped into another one, or be reported and forgotten.
    """

    def __init__(self, name: str) -> None:
        self._name = name

    def __call__(self, number: int, frame: FrameType | None) -> NoReturn:
        _say(self._name, "interrupted")
        os._exit(EXIT_INTERRUPTED)


def _say(name: str, problem: str) -> None:
    with contextlib.suppress(OSError):
        os.write(2, f"{name}: {problem}\n".encode(errors="backslashreplace"))


class _Output(io.FileIO):
    """Standard output, which remembers what has gone wrong: whoever has caught that may not have known whose it was."""

    problem: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            left = memoryview(data).cast("B")
            size = len(left)
            while left:
                written = super().write(left)
                if written is None:
                    # Somebody else has made it non-blocking: its other end's reader, say.
                    select.select((), (self.fileno(),), ())
                else:
                    left = left[written:]
            return size
        except OSError as error:
            self.problem = error
            raise


def _prepare_streams() -> _Output:
    """Puts in place what is written to later, as sys.stdout; returns what is below it."""
    for fd, stand_in in ((0, os.O_WRONLY), (1, os.O_RDONLY), (2, os.O_RDWR)):
        try:
            os.fstat(fd)
        except OSError:
            # What is opened next would get its number, and be read or written by mistake. Using standard input and
            # output still fails; what is said on standard error is lost.
            os.open(os.devnull, stand_in)
    if sys.stdin is None:
        sys.stdin = open(0, encoding="utf-8", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115
    codecs.register_error(_ESCAPE, _escape)
    output = _Output(1, "w", closefd=False)
    encoding = "utf-8" if sys.stdout is None else sys.stdout.encoding
    # As `python -u` and PYTHONUNBUFFERED want it.
    is_unbuffered = isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.write_through
    buffer: Any = output if is_unbuffered else io.BufferedWriter(output)
    sys.stdout = io.TextIOWrapper(
        buffer, encoding=encoding, errors=_ESCAPE, line_buffering=output.isatty(), write_through=is_unbuffered
    )
    return output


def _escape(error: UnicodeError) -> tuple[str, int]:
    """A character as JSON's escape, so that JSON stays what it is in every encoding."""
    import json

    if not isinstance(error, UnicodeEncodeError):
        raise error
    return json.dumps(error.object[error.start : error.end])[1:-1], error.end


def _end_output(name: str, output: _Output) -> None:
    """Writes what is left.

    Raises:
        SystemExit: standard output has not taken all of it, now or before, though somebody reads it.
    """
    with contextlib.suppress(OSError, ValueError):  # the command may have closed it
        sys.stdout.flush()
    if output.problem is None:
        return
    # The interpreter would try once more, and complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    if isinstance(output.problem, BrokenPipeError):
        return  # nobody reads any more; the command has decided what that means
    _say(name, f"standard output cannot be written: {output.problem.strerror}")
    raise SystemExit(EXIT_OTHER) from output.problem
