"""Tokens per second and memory of whole generations, each contender at the largest batch that its memory allows."""

from kvpolicy.bench.generation.measure import measure
from kvpolicy.bench.generation.setup import GenerateSetup

__all__ = ["GenerateSetup", "measure"]
