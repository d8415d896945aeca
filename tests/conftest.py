"""What all tests share."""

from hypothesis import settings

# No time limit for one example: the machine may be busy. A failure prints what reproduces it.
settings.register_profile("quorate", deadline=None, print_blob=True)
settings.load_profile("quorate")
