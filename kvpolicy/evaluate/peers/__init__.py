"""Other libraries measured on the same weights, prompts and continuations as ours, in a process of their own."""

from kvpolicy.evaluate.peers.names import ALL, PEERS, Peer, peers_of

__all__ = ["ALL", "PEERS", "Peer", "peers_of"]
