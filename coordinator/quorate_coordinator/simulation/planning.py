"""Makes a plan from a seed: what operators ask and what goes wrong, all of it before the run."""

import random
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, Final

from quorate_coordinator.simulation.faults import COORDINATOR
from quorate_coordinator.simulation.plan import FAULT_KINDS, OPERATORS, CallPlan, Fault, Plan, RevealPlan
from quorate_coordinator.simulation.tasks import EVERYBODY, middle_tasks, small_tasks
from quorate_protocol.errors import ConfigurationError
from quorate_protocol.limits import CONNECTIONS_MAX

#: Seconds without faults or calls at the end of a run, in which everything has to come to rest. Over what the slowest
#: recovery takes: an agent that notices the silence only when the last fault ends, and backs off.
QUIET_S: Final = 150.0

#: Hours of a run at the least: a minute in which something can go wrong, and then the quiet.
HOURS_MIN: Final = 0.06

#: And at the most: more is days of computing, and a plan that is made first fills the memory.
HOURS_MAX: Final = 1000.0

#: Agents at the most: a coordinator takes no more.
AGENTS_MAX: Final = CONNECTIONS_MAX

#: Calls in an hour, beside bursts: few in a great fleet, because agents are mostly idle; more in a small one, where
#: there should mostly be something in flight when something goes wrong.
_CALLS_AN_HOUR: Final = 400
_SMALL_FLEET_CALLS: Final = 15_000
_SMALL_FLEET: Final = 15

#: Faults come alone, or near one of so many moments in an hour: what breaks a system is often two things at once.
_STORMS_AN_HOUR: Final = 12
_STORM_SHARE: Final = 0.5
_STORM_S: Final = 15.0

#: Agents with which the disk is the real journal; more have a model of it, which is faster.
_JOURNAL_AGENTS_MAX: Final = 100

#: Faults of each kind in an hour, and one more for so many agent-hours, where it hits agents. Bursts and crashes of the
#: coordinator hit everybody, so that there are few.
_AN_HOUR: Final[dict[str, float]] = {
    "loss": 12.0,
    "reorder": 6.0,
    "duplicate": 12.0,
    "partition": 20.0,
    "agent-crash": 20.0,
    "agent-hang": 15.0,
    "coordinator-crash": 8.0,
    "disk-full": 5.0,
    "suspend": 12.0,
    "clock-jump": 12.0,
    "drain": 8.0,
    "burst": 4.0,
    "link-break": 20.0,
    "operator-break": 60.0,
}


def parse_kinds(text: str) -> tuple[str, ...]:
    """The kinds of faults that `all`, `none` or a list with commas names, in the order of FAULT_KINDS.

    Raises:
        ConfigurationError: one of them is none.
    """
    if text == "all":
        return FAULT_KINDS
    if text == "none":
        return ()
    wanted = {kind.strip() for kind in text.split(",")}
    unknown = sorted(wanted - {*FAULT_KINDS})
    if unknown:
        raise ConfigurationError("--faults", f"{unknown[0]!r} is not one of all, none, {', '.join(FAULT_KINDS)}")
    return tuple(kind for kind in FAULT_KINDS if kind in wanted)


def make_plan(seed: int, *, agents: int, hours: float, kinds: Iterable[str] = FAULT_KINDS) -> Plan:
    """The plan of a seed.

    Raises:
        ConfigurationError: a number makes no sense.
    """
    if not 1 <= agents <= AGENTS_MAX:
        raise ConfigurationError("--agents", f"must be from 1 to {AGENTS_MAX}, is {agents}")
    if not HOURS_MIN <= hours <= HOURS_MAX:
        raise ConfigurationError("--hours", f"must be from {HOURS_MIN:g} to {HOURS_MAX:g}, is {hours:g}")
    busy_s = hours * 3600.0 - QUIET_S
    draw = _stream(seed, "plan storms")
    storms = [draw.uniform(0.0, busy_s) for _ in range(max(1, round(_STORMS_AN_HOUR * busy_s / 3600.0)))]
    faults: list[Fault] = []
    for kind in kinds:
        draw = _stream(seed, f"plan {kind}")
        rate = _AN_HOUR[kind] * busy_s / 3600.0
        count = int(rate) + (draw.random() < rate % 1.0)
        faults += [_make_fault(kind, draw, agents, busy_s, storms) for _ in range(max(1, count))]
    calls = _make_calls(seed, agents, busy_s)
    for number, fault in enumerate(fault for fault in faults if fault.kind == "burst"):
        calls += _make_burst(seed, number, fault, agents)
    calls = [_reveal_in_time(call, busy_s) for call in calls]
    draw = _stream(seed, "plan operator-break moments")
    faults = [_break_while_waiting(fault, draw, calls, busy_s) for fault in faults]
    return Plan(
        seed=seed,
        agents=agents,
        hours=hours,
        calls=tuple(sorted(calls, key=lambda call: call.at_s)),
        faults=tuple(sorted(faults, key=lambda fault: fault.at_s)),
        disk="journal" if agents <= _JOURNAL_AGENTS_MAX else "model",
    )


def _stream(seed: int, subject: str) -> random.Random:
    return random.Random(f"{seed}/{subject}")  # noqa: S311  repeatable on purpose


# --- faults ---


def _some(draw: random.Random, agents: int) -> tuple[int, ...]:
    """A few agents, mostly; sometimes a part of the fleet that sits together, or all of it."""
    shape = draw.random()
    if shape < 0.6:
        return (draw.randrange(agents),)
    if shape < 0.9:
        first = draw.randrange(agents)
        return tuple(range(first, min(agents, first + draw.randint(1, max(1, min(60, agents // 3))))))
    return tuple(range(agents)) if draw.random() < 0.5 else tuple(range(0, agents, draw.randint(2, 9)))


def _make_fault(kind: str, draw: random.Random, agents: int, busy_s: float, storms: list[float]) -> Fault:
    duration_s, targets, detail = _SHAPES[kind](draw, agents)
    duration_s = min(duration_s, busy_s / 2.0)
    at_s = draw.uniform(0.0, busy_s)
    if draw.random() < _STORM_SHARE:
        at_s = draw.choice(storms) + draw.uniform(0.0, _STORM_S)
    return Fault(
        at_s=round(min(at_s, busy_s - duration_s), 3),
        kind=kind,
        duration_s=round(duration_s, 3),
        targets=targets,
        detail=detail,
    )


_Shape = tuple[float, tuple[int, ...], dict[str, Any]]


def _partition(draw: random.Random, agents: int) -> _Shape:
    up, down = draw.choice(((1, 1), (1, 1), (1, 0), (0, 1)))
    # Often about as long as a lease, where it is decided who is lost.
    duration_s = draw.choice((draw.uniform(0.1, 4.0), draw.uniform(4.0, 14.0), draw.uniform(14.0, 120.0)))
    return duration_s, _some(draw, agents), {"up": up, "down": down}


def _link_break(draw: random.Random, agents: int) -> _Shape:
    # Over before the lease, mostly: sessions are resumed, and what was finished meanwhile has to come. Often it is
    # everybody's link, as when a router starts again: then some are at work whatever the moment is.
    duration_s = draw.choice((0.0, draw.uniform(0.1, 3.0), draw.uniform(3.0, 9.0), draw.uniform(9.0, 20.0)))
    return duration_s, tuple(range(agents)) if draw.random() < 0.3 else _some(draw, agents), {}


def _suspension(draw: random.Random, agents: int) -> _Shape:
    # A process alone, whose clock goes on; or its machine, whose clock stands still with it and which hears nothing.
    duration_s = draw.choice((draw.uniform(0.05, 3.0), draw.uniform(3.0, 12.0), draw.uniform(12.0, 60.0)))
    targets = (COORDINATOR,) if draw.random() < 0.5 else _some(draw, agents)
    return duration_s, targets, {"timers": draw.random() < 0.5, "clock": draw.random() < 0.4}


def _clock_jump(draw: random.Random, agents: int) -> _Shape:
    # By minutes, days or years.
    by_s = draw.choice((60.0, 86_400.0, 3e7)) * draw.uniform(0.5, 5.0) * draw.choice((1.0, -1.0))
    return 0.0, (COORDINATOR,), {"by_s": round(by_s, 3)}


def _operator_break(draw: random.Random, agents: int) -> _Shape:
    # The coordinator hears of it at once, or when its own patience is over.
    heard_after_s = draw.choice((0.0, draw.uniform(0.01, 1.0), draw.uniform(1.0, 20.0)))
    who = tuple(range(OPERATORS)) if draw.random() < 0.4 else (draw.randrange(OPERATORS),)
    return heard_after_s, who, {}


def _drain(draw: random.Random, agents: int) -> _Shape:
    # The coordinator, or agents, or both at once: who comes back while it drains is refused.
    targets = _some(draw, agents) if draw.random() < 0.7 else ()
    return 0.0, (COORDINATOR, *targets) if not targets or draw.random() < 0.4 else targets, {}


_SHAPES: Final[dict[str, Callable[[random.Random, int], _Shape]]] = {
    "loss": lambda draw, agents: (
        draw.uniform(1.0, 300.0),
        _some(draw, agents),
        {"loss": round(draw.choice((0.02, 0.1, 0.3, 0.6)), 3)},
    ),
    "reorder": lambda draw, agents: (
        draw.uniform(1.0, 120.0),
        _some(draw, agents),
        {"spread_s": round(draw.uniform(0.01, 2.0), 3)},
    ),
    "duplicate": lambda draw, agents: (
        draw.uniform(10.0, 300.0),
        _some(draw, agents),
        {"share": round(draw.uniform(0.05, 0.9), 3)},
    ),
    "partition": _partition,
    "agent-crash": lambda draw, agents: (draw.expovariate(1 / 5.0), _some(draw, agents), {}),
    "agent-hang": lambda draw, agents: (draw.uniform(1.0, 90.0), _some(draw, agents), {}),
    "coordinator-crash": lambda draw, agents: (
        draw.choice((0.2, 2.0, 20.0)) * draw.uniform(0.5, 2.0),
        (COORDINATOR,),
        {"commit": draw.random() < 0.7},
    ),
    "disk-full": lambda draw, agents: (draw.uniform(1.0, 90.0), (COORDINATOR,), {}),
    "suspend": _suspension,
    "clock-jump": _clock_jump,
    "operator-break": _operator_break,
    "drain": _drain,
    "link-break": _link_break,
    "burst": lambda draw, agents: (draw.uniform(0.05, 5.0), (COORDINATOR,), {"calls": draw.randint(30, 150)}),
}  # fmt: skip


def _break_while_waiting(fault: Fault, draw: random.Random, calls: list[CallPlan], busy_s: float) -> Fault:
    """An operator's connection that breaks when nobody waits on it shows nothing: most of the time, somebody does."""
    if fault.kind != "operator-break" or draw.random() < 0.2:
        return fault
    at_s = draw.choice(calls).at_s + draw.choice((0.02, 0.2, 2.0)) * draw.uniform(0.1, 1.5)
    return replace(fault, at_s=round(min(at_s, busy_s - fault.duration_s), 3))


# --- calls ---


def _make_calls(seed: int, agents: int, busy_s: float) -> list[CallPlan]:
    draw = _stream(seed, "plan calls")
    an_hour = _CALLS_AN_HOUR + _SMALL_FLEET_CALLS / max(agents, _SMALL_FLEET)
    count = max(5, round(an_hour * busy_s / 3600.0))
    return [_make_call(draw, f"c{number}", draw.uniform(0.0, busy_s), agents) for number in range(count)]


def _make_burst(seed: int, number: int, fault: Fault, agents: int) -> list[CallPlan]:
    draw = _stream(seed, f"plan burst {number}")
    task = draw.choice(small_tasks(agents))
    calls = []
    for place in range(int(fault.detail["calls"])):
        at_s = fault.at_s + draw.uniform(0.0, fault.duration_s)
        call = _make_call(draw, f"b{number}-{place}", at_s, agents)
        # Half of them go to the same few agents.
        calls.append(replace(call, task=task) if place % 2 else call)
    return calls


def _reveal_in_time(call: CallPlan, busy_s: float) -> CallPlan:
    """The call with its truth told before the quiet."""
    if call.reveal is None or call.at_s + call.reveal.after_s <= busy_s:
        return call
    return replace(call, reveal=replace(call.reveal, after_s=round(max(0.0, busy_s - call.at_s), 3)))


def _make_call(draw: random.Random, key: str, at_s: float, agents: int) -> CallPlan:
    size = draw.random()
    if size < 0.75:
        task = draw.choice(small_tasks(agents))
    elif size < 0.985:
        task = draw.choice(middle_tasks(agents))
    else:
        task = EVERYBODY if draw.random() < 0.9 else "nobody-can"
    quorum, fraction = draw.choice(
        ((None, None), (None, None), (1, None), (3, None), (None, 0.5), (None, 1.0), (None, 0.1), (9, None))
    )
    deadline_s = draw.choice((None, None, 0.05, 0.5, 2.0, 5.0, 30.0))
    grace_s = draw.choice((None, None, None, 0.0, 0.1, 1.0, 4.0))
    reveal = None
    if draw.random() < 0.8:
        reveal = RevealPlan(
            after_s=round(draw.choice((0.0, draw.expovariate(0.5), draw.uniform(0.0, 600.0))), 3),
            times=draw.choice((1, 1, 1, 1, 2)),
            off_by=draw.choice((0,) * 12 + (1, -1, 5000)),
        )
    cancel_after_s = round(draw.uniform(0.0, 2.0), 3) if draw.random() < 0.08 else None
    return CallPlan(
        at_s=round(at_s, 3),
        key=key,
        task=task,
        quorum=quorum,
        quorum_fraction=fraction,
        grace_s=grace_s,
        deadline_s=deadline_s,
        attempts=draw.choice((None, None, None, 2, 3)),
        count=draw.choice((None, None, None, None, 3)),
        keyed=draw.random() < 0.75,
        cancel_after_s=cancel_after_s,
        reveal=reveal,
    )
