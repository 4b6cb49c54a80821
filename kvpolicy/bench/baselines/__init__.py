"""Baselines: full caches, the methods in plain torch, other libraries."""
