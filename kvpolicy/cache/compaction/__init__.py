"""How entries that stay are moved after a compression."""
