"""Benchmarks: `quorate bench`. Each measures on this machine, beside a peer where there is one."""
