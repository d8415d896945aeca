"""When a round may end: quorum, grace and deadline, and what of them contradicts itself."""

import math
from dataclasses import dataclass, replace
from typing import Final, Literal

from quorate_protocol.errors import LocalError
from quorate_protocol.limits import SECONDS_MAX

#: Taken off before rounding a fraction of the selected up, so that 0.1 of 30 is 3 and not 4: the
#: product is 3.0000000000000004 in binary. Far above the error of any fleet's product, far below one agent.
_ROUNDING: Final = 1e-9

PolicyField = Literal["selected", "quorum", "quorum_fraction", "grace_s", "deadline_s", "attempts"]

#: More attempts in one round are a loop by mistake.
ATTEMPTS_MAX: Final = 100


class PolicyConflict(LocalError):
    """A round's policy cannot be kept. `field` names what is wrong as it stands in `ask`."""

    def __init__(self, field: PolicyField, problem: str) -> None:
        super().__init__(f"{field}: {problem}")
        self.field = field
        self.problem = problem


class NobodySelected(PolicyConflict):
    """The round has nobody to ask."""

    def __init__(self) -> None:
        super().__init__("selected", "no agent was selected")


class TooFewSelected(PolicyConflict):
    """The quorum is over the number selected: there may be more agents later, right after a restart above all."""

    def __init__(self, quorum: int, selected_count: int) -> None:
        super().__init__("quorum", f"{quorum} is over the {selected_count} selected")


@dataclass(frozen=True, slots=True)
class ResolvedPolicy:
    """A policy that fits the number of agents selected."""

    #: Replies needed, at least 1 and at most the number selected.
    quorum: int
    #: Seconds left to stragglers once quorum is met; None leaves them until the deadline.
    grace_s: float | None
    #: Seconds from opening to the hard end.
    deadline_s: float
    #: How often one agent may be given the assignment, at least 1.
    attempts: int = 1


@dataclass(frozen=True, slots=True)
class RoundPolicy:
    """What an operator (or the learner, or the settings) wants of a round. Checked by `resolve` alone.

    Of `quorum` and `quorum_fraction` exactly one is given.
    """

    #: Seconds from opening to the hard end; positive.
    deadline_s: float
    #: Seconds left to stragglers once quorum is met: 0 closes at quorum, None waits until the deadline.
    grace_s: float | None
    #: Replies needed, as a count.
    quorum: int | None = None
    #: Replies needed, as a share of the selected agents in (0, 1], rounded up.
    quorum_fraction: float | None = None
    #: How often one agent may be given the assignment: again when it failed, or came back after it was lost.
    #: With 1 no handler is run twice for one round.
    attempts: int = 1

    def override(
        self,
        *,
        quorum: int | None = None,
        quorum_fraction: float | None = None,
        grace_s: float | None = None,
        deadline_s: float | None = None,
        attempts: int | None = None,
    ) -> "RoundPolicy":
        """This policy as the default for a request that states some values itself; None means not stated.

        A default grace that is longer than the request's own deadline is cut to it: only what one
        request states by itself can contradict itself. A quorum stated in either form replaces the
        default's in both.
        """
        wanted = self
        if quorum is not None or quorum_fraction is not None:
            wanted = replace(wanted, quorum=quorum, quorum_fraction=quorum_fraction)
        if deadline_s is not None:
            wanted = replace(wanted, deadline_s=deadline_s)
            if wanted.grace_s is not None and wanted.grace_s > deadline_s:
                wanted = replace(wanted, grace_s=deadline_s)
        if grace_s is not None:
            wanted = replace(wanted, grace_s=grace_s)
        if attempts is not None:
            wanted = replace(wanted, attempts=attempts)
        return wanted

    def resolve(self, selected_count: int) -> ResolvedPolicy:
        """The policy for this many selected agents, those without a link among them.

        Raises:
            NobodySelected: `selected_count` is 0.
            PolicyConflict: quorum stated twice, not at all, not positive or over the number selected; a
                deadline that is not positive or over a year; a grace that is negative or past the deadline;
                attempts out of bounds.
        """
        if selected_count < 1:
            raise NobodySelected
        if not 0 < self.deadline_s <= SECONDS_MAX:
            raise PolicyConflict("deadline_s", f"{self.deadline_s:g} s is not a time over 0 and up to a year")
        if self.grace_s is not None and not self.grace_s >= 0:
            raise PolicyConflict("grace_s", f"{self.grace_s:g} s is not a time")
        if self.grace_s is not None and self.grace_s > self.deadline_s:
            raise PolicyConflict("grace_s", f"{self.grace_s:g} s is past the deadline of {self.deadline_s:g} s")
        if not 1 <= self.attempts <= ATTEMPTS_MAX:
            raise PolicyConflict("attempts", f"{self.attempts} is not from 1 to {ATTEMPTS_MAX}")
        return ResolvedPolicy(self._quorum_of(selected_count), self.grace_s, self.deadline_s, self.attempts)

    def _quorum_of(self, selected_count: int) -> int:
        if self.quorum is not None and self.quorum_fraction is not None:
            raise PolicyConflict("quorum", "given both as a count and as a fraction")
        if self.quorum is not None:
            if self.quorum < 1:
                raise PolicyConflict("quorum", f"{self.quorum} is less than one reply")
            if self.quorum > selected_count:
                raise TooFewSelected(self.quorum, selected_count)
            return self.quorum
        if self.quorum_fraction is None:
            raise PolicyConflict("quorum", "given neither as a count nor as a fraction")
        if not 0 < self.quorum_fraction <= 1:
            raise PolicyConflict("quorum_fraction", f"{self.quorum_fraction:g} is not over 0 and at most 1")
        return max(1, math.ceil(self.quorum_fraction * selected_count - _ROUNDING))
