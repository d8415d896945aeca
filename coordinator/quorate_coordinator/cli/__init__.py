"""The command `quorate`."""
