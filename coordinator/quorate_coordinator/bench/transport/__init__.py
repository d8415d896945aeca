"""`quorate bench transport`: our transport and stock aioquic's asyncio API, side by side.

Theory of operation. For each of the two there is a pair of processes (`peer`), one that listens and one that
connects, over loopback; this process tells them what to do, by lines of JSON on their standard input (`children`).
What they do is written once (`services` for the listening side, `workloads` for the connecting one) against a
narrow face (`link`), which `quorate_side` and `stock_side` give to the two transports. `scenarios` says what is
measured for which row, always both in turn, so that whatever else the machine does meets both alike.
"""
