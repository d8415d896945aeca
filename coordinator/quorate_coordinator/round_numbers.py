"""Round numbers that no earlier run of the coordinator has used.

A truth that is told late must not meet another question under the same number. The file holds the
first number that is still free; numbers are taken from it in blocks, so that a restart skips some and
a round costs no write.
"""

import errno
from pathlib import Path
from typing import Final

import structlog

from quorate_coordinator.files import write_file
from quorate_protocol.errors import ConfigurationError

log = structlog.get_logger()

#: Numbers reserved at once, and how many may be left when the next block is.
_BLOCK: Final = 10_000
_LEFT_MIN: Final = 1_000


class RoundNumbers:
    """Reads and reserves.

    Args:
        file: made on first use.

    Raises:
        ConfigurationError: it cannot be read or written, or holds something else.
    """

    def __init__(self, file: Path) -> None:
        self._file = file
        try:
            first = int(file.read_text())
        except FileNotFoundError:
            first = 1
        except (OSError, ValueError) as error:
            raise ConfigurationError(
                "state_dir", f"{file} does not hold a round number ({error}); write the next free one into it"
            ) from error
        if first < 1:
            raise ConfigurationError("state_dir", f"{file} holds {first}, which is no round number")
        #: The first number of this run.
        self.first: Final = first
        self._reserved = first
        try:
            self._reserve(first + _BLOCK)
        except ConfigurationError as error:
            if first == 1 or not _is_full(error.__cause__):
                raise
            # No round is opened before there are numbers: see `check`.
            log.error("round_numbers_not_reserved", problem=str(error))

    def check(self, number: int) -> None:
        """Whether a round may take this number; reserves more where it has to.

        Raises:
            ConfigurationError: no more can be reserved, and after a restart this one would be given again.
        """
        if number >= self._reserved:
            self._reserve(self._reserved + _BLOCK)

    def use(self, number: int) -> None:
        """A round took this number.

        Raises:
            ConfigurationError: no more can be reserved.
        """
        if number + _LEFT_MIN >= self._reserved:
            self._reserve(self._reserved + _BLOCK)

    def _reserve(self, free: int) -> None:
        try:
            self._file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            write_file(self._file, f"{free}\n".encode())
        except OSError as error:
            raise ConfigurationError("state_dir", f"cannot write {self._file}: {error.strerror or error}") from error
        self._reserved = free


def _is_full(error: BaseException | None) -> bool:
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
