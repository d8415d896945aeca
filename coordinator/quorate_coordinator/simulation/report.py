"""What is said of runs: the totals when everything held, and what is known when something did not."""

from collections import Counter
from typing import Any

from quorate_coordinator.simulation.plan import FAULT_KINDS
from quorate_coordinator.simulation.run import Report


class Totals:
    """What all runs come to."""

    def __init__(self) -> None:
        self._reports: list[dict[str, Any]] = []
        self._agent_hours = self._elapsed_s = 0.0
        self._events = 0
        self._counts: dict[str, Counter[str]] = {
            name: Counter() for name in ("rounds", "statuses", "faults", "strays", "calls")
        }

    @property
    def runs(self) -> int:
        """How many there were."""
        return len(self._reports)

    def add(self, report: Report) -> None:
        """One more run is over."""
        self._reports.append(report.as_json())
        self._agent_hours += report.agent_hours
        self._elapsed_s += report.elapsed_s
        self._events += report.events
        for name, counts in self._counts.items():
            counts.update(getattr(report, name))

    def as_json(self) -> dict[str, Any]:
        """For `--json`."""
        return {"runs": self._reports}

    def as_text(self) -> str:
        """For people; of runs in which everything held."""
        first, last = self._reports[0], self._reports[-1]
        which = f"seed {first['seed']}" if self.runs == 1 else f"seeds {first['seed']} to {last['seed']}"
        speed = self._agent_hours / self._elapsed_s if self._elapsed_s else 0.0
        lines = [
            f"{which}: {first['agents']} agents, {first['hours']:g} h: every invariant held",
            f"{'events':10} {self._events:,} in {self._elapsed_s:.1f} s: {speed:,.0f} agent-hours per second",
        ]
        for name, counts in self._counts.items():
            shown = ", ".join(f"{count} {what}" for what, count in sorted(counts.items()))
            lines.append(f"{name:10} {shown or 'none'}")
        if self.runs == 1 and first["trace_digest"]:
            lines.append(f"{'trace':10} {first['trace_digest']}")
        return "\n".join(lines)


def as_json(report: Report, shorter: Report, command: str) -> dict[str, Any]:
    """A run that failed, the shortened one, and the command that plays that."""
    return {
        "runs": [report.as_json()],
        "shortened": shorter.as_json(),
        "command": command,
        "whole": _whole(report),
    }


def as_text(report: Report, shorter: Report, command: str) -> str:
    """The same for people."""
    plan, small, violation = report.plan, shorter.plan, shorter.violation
    assert violation is not None
    lines = [
        f"violated: {violation.invariant}",
        f"  {violation.message}",
        f"  seed {plan.seed}, {violation.at_s:.3f} virtual seconds after the start",
    ]
    if shorter is report:
        return "\n".join([*lines, f"again: {command}", f"or:    {_whole(report)}"])
    lines += [
        f"shortened from {len(plan.faults)} faults, {len(plan.calls)} calls, {plan.agents} agents, {plan.hours:g} h "
        f"to {len(small.faults)} faults, {len(small.calls)} calls, {small.agents} agents, {small.hours:.3g} h",
    ]
    lines += [
        f"  {fault.at_s:11.4f} {fault.kind} of {', '.join(map(str, fault.targets))} for {fault.duration_s:g} s"
        for fault in small.faults
    ]
    lines += ["the last that concerns it:", *(f"  {line}" for line in violation.trace)]
    lines += [f"again, shortened: {command}", f"again, whole:     {_whole(report)}"]
    return "\n".join(lines)


def _whole(report: Report) -> str:
    plan = report.plan
    kinds = ",".join(kind for kind in FAULT_KINDS if any(fault.kind == kind for fault in plan.faults)) or "none"
    wanted = "all" if {*kinds.split(",")} == {*FAULT_KINDS} else kinds
    how = "" if report.engine == "model" else f" --engine {report.engine}"
    return f"quorate simulate --seed {plan.seed} --agents {plan.agents} --hours {plan.hours!r} --faults {wanted}{how}"
