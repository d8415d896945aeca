"""QUIC engines behind one port: sans-I/O connections that the endpoint drives."""

from quorate_protocol.transport.engine.aioquic_engine import AioquicFactory
from quorate_protocol.transport.engine.port import Address, Arrival, Engine, EngineFactory, Sink

__all__ = ["Address", "AioquicFactory", "Arrival", "Engine", "EngineFactory", "Sink"]
