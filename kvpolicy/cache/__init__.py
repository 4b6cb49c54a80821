"""Entries of all layers: where they are held, when and how they are compressed, and their state."""
