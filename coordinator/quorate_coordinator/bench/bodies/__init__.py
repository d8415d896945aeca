"""`quorate bench bodies`: what a large body does to small rounds beside it.

One agent is asked a question of a GiB and gives it back; another is asked a small one every ten milliseconds meanwhile.
On few processors the five processes of that also wait for each other, whoever coordinates. So two more things are
measured in the same run: the same small rounds while three other processes move the same bytes by TLS over TCP, and,
inside the coordinator, how long its event loop keeps a frame waiting, with and without the time in which it had no
processor.
"""
