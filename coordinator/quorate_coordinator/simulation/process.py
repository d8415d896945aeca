"""A process: it runs, stands still for a while (SIGSTOP, a suspended machine), and is gone at some time."""

from collections.abc import Callable
from typing import Any

from quorate_coordinator.simulation.world import World


class Process:
    """What reaches it (messages, timers) goes through `call`, and waits while it stands still.

    Args:
        world: Where it lives.
        clock_s: What its monotonic clock shows at its start: another number after each start of its machine.
    """

    def __init__(self, world: World, *, clock_s: float) -> None:
        self.world = world
        self.is_alive = True
        self.is_suspended = False
        #: Until when its sockets were read, while there may be more in them; None when all is read.
        self.read_until: float | None = None
        self._waiting: list[tuple[float | None, Callable[..., None], tuple[Any, ...]]] = []
        #: Its clock, less the world's.
        self._skew = clock_s - world.now
        #: Its clock at the last timer: what was due then is not a rounding error later.
        self._clock_min = clock_s
        #: (when, seconds): when its machine went on that had stood still with its clock.
        self._pauses: list[tuple[float, float]] = []

    @property
    def now(self) -> float:
        """Its monotonic clock, in seconds."""
        now = self.world.now + self._skew
        return now if now > self._clock_min else self._clock_min  # noqa: FURB136  asked for at every event

    def clock_at(self, moment: float) -> float:
        """What its clock showed at a moment of the world's, while it ran."""
        clock = moment + self._skew
        for ended_at, pause_s in self._pauses:
            if ended_at > moment:
                clock += pause_s
        return clock

    @property
    def is_running(self) -> bool:
        """Alive, and not suspended."""
        return self.is_alive and not self.is_suspended

    def call(self, action: Callable[..., None], *arguments: Any) -> None:
        """Lets it do something; later, when it is suspended; never, when it is gone."""
        if self.is_suspended:
            self._waiting.append((None, action, arguments))
        elif self.is_alive:
            action(*arguments)

    def after(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Sets one of its timers."""
        self.at(self.now + delay_s, action, *arguments)

    def at(self, clock_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Sets one of its timers for a moment of its own clock."""
        self.world.at(clock_s - self._skew, self._fire, clock_s, action, arguments)

    def suspend(self) -> None:
        """It stands still from now on."""
        if self.is_running:
            self.is_suspended = True
            self.read_until = self.world.now

    def set_back(self, pause_s: float) -> None:
        """Its clock has stood still with it for so long: to be called before `resume`."""
        self._skew -= pause_s
        self._pauses.append((self.world.now, pause_s))

    def resume(self, *, timers_first: bool) -> None:
        """It goes on, with all that came meanwhile; a loop may look at its timers or at its sockets first."""
        if not self.is_suspended:
            return
        self.is_suspended = False
        waiting, self._waiting = self._waiting, []
        for is_timer in (timers_first, not timers_first):
            if not is_timer:
                self.read_until = None
            for clock_s, action, arguments in waiting:
                if clock_s is not None and is_timer:
                    self._fire(clock_s, action, arguments)
                elif clock_s is None and not is_timer and self.is_alive:
                    action(*arguments)

    def die(self) -> None:
        """It is gone, with all that waited for it."""
        self.is_alive = False
        self.is_suspended = False
        self._waiting.clear()

    def _fire(self, clock_s: float, action: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if self.is_suspended:
            self._waiting.append((clock_s, action, arguments))
        elif self.is_alive:
            if clock_s - self._skew > self.world.now:  # its clock has stood still since
                self.at(clock_s, action, *arguments)
                return
            self._clock_min = max(self._clock_min, clock_s)
            action(*arguments)
