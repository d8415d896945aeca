"""Rounds: broadcast, gather, close. A pure core; nothing here knows asyncio, sockets, clocks, River or SQLite.

Theory of operation. The shell (whoever owns the connections and the loop) turns what happens into
`events`, hands each to `RoundBook.handle(event, now)`, and carries out the `instructions` that come
back, in their order. `now` is a monotonic time in seconds. After every event the shell asks
`RoundBook.next_timer()` and sees to it that a `TimerFired` comes at or after that moment.

- `policy`: quorum, grace, deadline, and what of them contradicts itself.
- `table`: the states of one round and what moves it from one to the next, as data.
- `round`: one round.
- `book`: all rounds in flight and those that are closed but remembered.
- `shelf`: bounded memory for the closed ones.
"""
