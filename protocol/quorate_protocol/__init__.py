"""The floor that coordinator and agents share: limits, errors, frames, messages, transport, client."""

__version__ = "0.1.0"
