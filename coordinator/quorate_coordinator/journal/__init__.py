"""The durable record of what the coordinator did: one SQLite file, written by one thread, read by anybody.

`records` says what is written, `writer` writes it, `reader` reads it, `verify` checks it, `prune` takes away what is
old. SQLite is imported here and nowhere else.
"""
