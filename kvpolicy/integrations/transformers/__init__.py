"""Policies attached to models of transformers."""
