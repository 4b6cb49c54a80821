"""Caches saved to files, and digests of what they were made with."""
