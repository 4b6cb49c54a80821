"""Tile functions of the built-in scorers. They import Triton, so plugins import them where they are used."""
