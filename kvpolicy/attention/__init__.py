"""Attention over held entries: in one call, for ragged heads, block by block, or by a kernel."""
