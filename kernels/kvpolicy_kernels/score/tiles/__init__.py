"""Tile functions of the built-in scorers. Each needs Triton: import them where they are used."""
