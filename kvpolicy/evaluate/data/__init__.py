"""Texts, questions and conversations of real data, from pinned wheels, and reads of files."""
