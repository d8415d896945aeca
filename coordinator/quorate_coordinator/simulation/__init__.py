"""A whole fleet under virtual time, from one seed: the real cores, modelled shells, and every fault that we know.

Theory of operation. A `plan` says beforehand what operators ask and what goes wrong; `planning` draws it from a seed.
The `world` has a clock that jumps from event to event. In it live the agents' processes (`agents`), the
coordinator's (`coordinator`, with `members` and `rounds`), its `disk` (up to 100 agents a real journal:
`journal_disk`), the `network` between them and the `operators`; `faults` does to them what the plan says. The
`auditor` hears of everything that can be seen from outside and checks what must hold: deadlines after every event, what
an event is about at that event, everybody every minute of virtual time (ARCHITECTURE.md, "Simulation", has the list).
`run` plays one plan, `shorten` makes a plan that fails as small as it can.

What decides is the code that runs in production: `RoundBook`, `Planner`, `Keys`, `Ledger`, `Registry`, `AgentCore`,
`Backoff`, the learner.
`members`, `rounds` and `agents` are models of their shells, and the only files here that know
a core's events and instructions: when a core changes, its file here follows.

Nothing here knows asyncio, sockets, threads, the real time of day or the hash seed: the same plan gives the same trace,
byte for byte. Randomness comes in streams, one for each subject (an agent's nature, a path's latencies, the disk's
delays), so that a fault more or less does not shift everybody's fate: that is what lets a failing plan be shortened.
"""
