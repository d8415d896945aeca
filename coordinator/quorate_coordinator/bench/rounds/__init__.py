"""`quorate bench rounds`: how many rounds a second, how long one takes, and what the journal costs.

Two coordinators run beside each other, with a journal and without, each with a crowd of agents of the same size; they
are asked in turn, for a second at a time. Each crowd lives in few processes: with a process for each agent, the
kernel's switching between them would be measured.
"""
