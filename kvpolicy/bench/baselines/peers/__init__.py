"""Presses of kvpress, timed in the environment of the peers."""

from kvpolicy.bench.baselines.peers.client import PRESSES, Request, ask

__all__ = ["PRESSES", "Request", "ask"]
