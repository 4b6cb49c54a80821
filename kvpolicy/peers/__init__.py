"""Other libraries that do what kvpolicy does, in environments of their own, made when asked for."""

from kvpolicy.peers.environment import install, python_of, required_python
from kvpolicy.peers.process import PeerProcess

__all__ = ["PeerProcess", "install", "python_of", "required_python"]
