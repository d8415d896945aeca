"""Feeding a stream of instances to the fleet: ask, reveal, count, report (prequential evaluation).

`sources` reads instances, `tally` counts, `run` does the asking, `report` shows.
"""
