"""Other libraries, timed in environments of their own that the benchmark makes when asked."""

from kvpolicy.bench.baselines.peers.client import PRESSES, Request, ask
from kvpolicy.bench.baselines.peers.environment import install, python_of

__all__ = ["PRESSES", "Request", "ask", "install", "python_of"]
