"""The form of every benchmark's result."""

import importlib.metadata
import os
import platform
from collections.abc import Collection
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import quorate_protocol


@dataclass(frozen=True, slots=True)
class Row:
    """One measured number."""

    name: str
    unit: str
    value: float
    #: What it is compared with in the same run; None where there is nothing of its kind.
    peer: str | None = None
    peer_value: float | None = None
    #: The number to reach, in the same unit; None where none is promised.
    target: float | None = None
    #: Whether a smaller value is the better one.
    lower_is_better: bool = True
    #: What has to be known to read it, for people.
    note: str | None = None

    @property
    def ratio(self) -> float | None:
        """How many times better than the peer, over 1 where it is better; None without a peer or with a value of 0."""
        if not self.peer_value or not self.value:
            return None
        return self.peer_value / self.value if self.lower_is_better else self.value / self.peer_value

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without one."""
        if self.target is None:
            return None
        return self.value <= self.target if self.lower_is_better else self.value >= self.target


@dataclass(frozen=True, slots=True)
class Result:
    """A benchmark's rows."""

    benchmark: str
    rows: list[Row]
    machine: dict[str, Any] = field(default_factory=lambda: describe_machine())
    #: What the peer is compared with.
    subject: str = "Quorate"

    def as_json(self) -> dict[str, Any]:
        """`{"benchmark", "machine", "rows": [{"name", "unit", "value", "peer", "peer_value", "target", "met"}]}`."""
        rows = []
        for row in self.rows:
            entry = asdict(row)
            del entry["lower_is_better"], entry["note"]
            rows.append({**entry, "met": row.met})
        return {"benchmark": self.benchmark, "machine": self.machine, "rows": rows}


def is_selected(name: str, only: Collection[str]) -> bool:
    """Whether a row was asked for."""
    return not only or any(text.casefold() in name.casefold() for text in only)


def describe_machine() -> dict[str, Any]:
    """What the numbers depend on."""
    model = ""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.split(":", 1)[1].strip()
                break
    except OSError:
        model = platform.processor()
    return {
        "cpu": model,
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "quorate": quorate_protocol.__version__,
        "aioquic": importlib.metadata.version("aioquic"),
    }
