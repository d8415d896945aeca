"""The learner: turns closed rounds and their truths into state, and state into the next coordination message.

`api` is what the coordinator sees of any learner; `vote` is the one it ships.
"""
