"""A process: it runs, stands still for a while (SIGSTOP, a suspended machine), and is gone at some time."""

from collections.abc import Callable
from typing import Any

from quorate_coordinator.simulation.world import World


class Process:
    """What reaches it (messages, timers) goes through `call`, and waits while it stands still."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.is_alive = True
        self.is_suspended = False
        #: Until when its sockets were read, while there may be more in them; None when all is read.
        self.read_until: float | None = None
        self._waiting: list[tuple[bool, Callable[..., None], tuple[Any, ...]]] = []

    @property
    def is_running(self) -> bool:
        """Alive, and not suspended."""
        return self.is_alive and not self.is_suspended

    def call(self, action: Callable[..., None], *arguments: Any) -> None:
        """Lets it do something; later, when it is suspended; never, when it is gone."""
        if self.is_suspended:
            self._waiting.append((False, action, arguments))
        elif self.is_alive:
            action(*arguments)

    def after(self, delay_s: float, action: Callable[..., None], *arguments: Any) -> None:
        """Sets one of its timers."""
        self.world.after(delay_s, self._fire, action, arguments)

    def at(self, moment: float, action: Callable[..., None], *arguments: Any) -> None:
        """Sets one of its timers for a moment."""
        self.world.at(moment, self._fire, action, arguments)

    def suspend(self) -> None:
        """It stands still from now on."""
        if self.is_running:
            self.is_suspended = True
            self.read_until = self.world.now

    def resume(self, *, timers_first: bool) -> None:
        """It goes on, with all that came meanwhile; a loop may look at its timers or at its sockets first."""
        if not self.is_suspended:
            return
        self.is_suspended = False
        waiting, self._waiting = self._waiting, []
        for is_timer in (timers_first, not timers_first):
            if not is_timer:
                self.read_until = None
            for was_timer, action, arguments in waiting:
                if was_timer == is_timer and self.is_alive:
                    action(*arguments)

    def die(self) -> None:
        """It is gone, with all that waited for it."""
        self.is_alive = False
        self.is_suspended = False
        self._waiting.clear()

    def _fire(self, action: Callable[..., None], arguments: tuple[Any, ...]) -> None:
        if self.is_suspended:
            self._waiting.append((True, action, arguments))
        elif self.is_alive:
            action(*arguments)
