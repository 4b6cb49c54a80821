"""Discovery of plugins and policies, and look-up by name."""
