"""What can be wrong with a journal.

::

    LocalError
    ├── RecordInvalid         one record cannot be written or read
    ├── JournalUnusable       the file is not there, cannot be opened or is something else
    │   ├── JournalTooNew     a later Quorate wrote it
    │   └── JournalDamaged    it is a journal, and what it holds is not what was written
    └── ConfigurationError
        └── JournalInUse      another process writes it
"""

from pathlib import Path

from quorate_protocol.errors import ConfigurationError, LocalError


class RecordInvalid(LocalError):
    """One record cannot be written or read. `problem` names the field."""

    def __init__(self, kind: str, problem: str) -> None:
        super().__init__(f"invalid {kind} record: {problem}")
        self.kind = kind
        self.problem = problem


class JournalUnusable(LocalError):
    """The file is not there, cannot be opened, or is something else."""

    def __init__(self, file: Path, problem: str) -> None:
        super().__init__(f"{file}: {problem}")
        self.file = file
        self.problem = problem


class JournalTooNew(JournalUnusable):
    """A later version of Quorate wrote it; this one would misread it."""

    def __init__(self, file: Path, version: int, version_known: int) -> None:
        super().__init__(
            file,
            f"is a journal of version {version}, and this Quorate knows versions up to {version_known}; "
            "install the Quorate that wrote it, or a later one",
        )
        self.version = version
        self.version_known = version_known


class JournalDamaged(JournalUnusable):
    """What it holds is not what was written: bits have changed, or part of the file is gone.

    `seq` is the record's number; None when the damage is elsewhere.
    """

    def __init__(self, file: Path, problem: str, seq: int | None = None) -> None:
        what = "" if seq is None else f"record {seq}: "
        super().__init__(
            file,
            f"is damaged: {what}{problem}; `quorate journal verify` says how much, `quorate journal export` saves what "
            "can be read; then restore a copy, or move the file away and the coordinator begins a new one",
        )
        self.damage = what + problem
        self.seq = seq


class JournalInUse(ConfigurationError):
    """Another process writes it: two coordinators may not share a state directory."""

    def __init__(self, file: Path, owner: str) -> None:
        super().__init__("state_dir", f"{file} is in use by another process{owner}; each needs a directory of its own")
        self.file = file
