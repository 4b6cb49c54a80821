"""Commands that measure how good a policy is."""
