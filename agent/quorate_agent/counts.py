"""What an agent counts of its work."""

from dataclasses import dataclass


@dataclass(slots=True)
class Counts:
    """What happened since the start; only grows."""

    #: Not those that were known.
    assignments: int = 0
    #: Assignments that came again and were known.
    duplicates: int = 0
    replied: int = 0
    declined: int = 0
    failed: int = 0
    #: Assignments whose reply nobody waited for: the round was cancelled, its deadline passed in the queue, or
    #: another attempt took its place.
    cancelled: int = 0
    #: Work that died with its session or with the agent.
    lost: int = 0
    #: Replies of a session that was resumed that were not kept for long enough.
    replies_lost: int = 0
    #: Feedback that its handler has finished.
    feedback: int = 0
    feedback_failed: int = 0
    #: Feedback whose body was not remembered any more, or never there.
    feedback_forgotten: int = 0
    #: Feedback over the ceiling of what may wait.
    feedback_dropped: int = 0
    #: Bodies that made room for newer ones.
    bodies_forgotten: int = 0
    sessions: int = 0
    #: How often a session went on over another link.
    resumed: int = 0
