"""The simulation's plans played by real shells: coordinator, workers and clients over the QUIC engine, in one process.

What the models of `simulation` leave out is in here: streams, datagrams, TLS, the engine's timers, the loop's tasks,
the journal's file. Time is virtual (`virtual_loop`) and the network is in memory (`network`); both go on only as fast
as the loop does, so that a fleet here is some dozens of agents, and not a thousand.

A plan is the same plan, and its faults hit at the same moments. The run is not the same to the byte, as the models' is:
TLS is random, the journal has a thread. So a run that fails is not shortened.
"""
