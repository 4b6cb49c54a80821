"""Which models can carry a policy."""
