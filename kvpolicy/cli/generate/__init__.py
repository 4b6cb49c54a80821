"""Commands that write text with a model."""
