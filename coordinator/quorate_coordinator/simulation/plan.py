"""What will happen, known beforehand: the operators' calls and the faults. A plan is data; JSON holds it."""

import json
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final, Self

from quorate_protocol.errors import ConfigurationError

#: What may go wrong, as `--faults` names it.
FAULT_KINDS: Final = (
    "loss",
    "reorder",
    "duplicate",
    "partition",
    "agent-crash",
    "agent-hang",
    "coordinator-crash",
    "disk-full",
    "suspend",
    "clock-jump",
    "drain",
    "burst",
    "link-break",
    "operator-break",
)

#: Of the JSON; a plan of another is refused.
_VERSION: Final = 2


@dataclass(frozen=True, slots=True)
class Fault:
    """One thing that goes wrong."""

    #: Seconds after the start.
    at_s: float
    kind: str
    #: How long it lasts, in seconds.
    duration_s: float
    #: Agents by number, operators with `operator-break`; -1 is the coordinator.
    targets: tuple[int, ...]
    #: What the kind wants to know beside.
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class RevealPlan:
    """A truth that an operator will tell."""

    #: Seconds after the outcome.
    after_s: float
    #: How often.
    times: int = 1
    #: Instead of the round's own number: one so many higher.
    off_by: int = 0


@dataclass(frozen=True, slots=True)
class CallPlan:
    """A round that an operator will ask for."""

    #: Seconds after the start.
    at_s: float
    #: Names the call, also when it is made again.
    key: str
    task: str
    quorum: int | None = None
    quorum_fraction: float | None = None
    grace_s: float | None = None
    deadline_s: float | None = None
    attempts: int | None = None
    count: int | None = None
    #: Whether the operator gives the round a key, under which it finds it again.
    keyed: bool = True
    #: Seconds until the operator withdraws the call; None when it waits.
    cancel_after_s: float | None = None
    reveal: RevealPlan | None = None


#: Operators that make a plan's calls, each over one connection.
OPERATORS: Final = 3


def operator_of(key: str) -> int:
    """The number of the operator that makes a call."""
    return key.encode()[-1] % OPERATORS


@dataclass(frozen=True, slots=True)
class Plan:
    """One run."""

    seed: int
    agents: int
    hours: float
    calls: tuple[CallPlan, ...]
    faults: tuple[Fault, ...]
    #: `journal` is SQLite's file, `model` a list of records. It stays when the fleet is made smaller.
    disk: str = "journal"

    @property
    def size(self) -> int:
        """How much there is in it."""
        return len(self.calls) + len(self.faults)

    def to_json(self) -> str:
        """As text that `from_json` reads."""
        return json.dumps({"version": _VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The plan of a text.

        Raises:
            ConfigurationError: it holds no plan, or one of another version.
        """
        try:
            raw = json.loads(text)
            version = raw.pop("version")
            if version != _VERSION:
                raise ConfigurationError("--plan", f"is of version {version}; this is version {_VERSION}")
            calls = tuple(
                CallPlan(**{**call, "reveal": None if call["reveal"] is None else RevealPlan(**call["reveal"])})
                for call in raw.pop("calls")
            )
            faults = tuple(Fault(**{**fault, "targets": tuple(fault["targets"])}) for fault in raw.pop("faults"))
            unknown = {fault.kind for fault in faults} - {*FAULT_KINDS}
            if unknown:
                raise ConfigurationError("--plan", f"has a fault of no known kind: {', '.join(sorted(unknown))}")
            return cls(calls=calls, faults=faults, **raw)
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ConfigurationError("--plan", f"is no plan ({type(error).__name__}: {error})") from None

    def only(self, *, calls: tuple[CallPlan, ...] | None = None, faults: tuple[Fault, ...] | None = None) -> "Plan":
        """The same with other calls or faults."""
        return replace(
            self, calls=self.calls if calls is None else calls, faults=self.faults if faults is None else faults
        )
