"""Passes over the cached context behind a prompt, for scorers that read prompts again."""
