"""The testbed's tasks: each generates a prompt and the one right answer from (task, seed, index, length)."""

from kvpolicy.evaluate.testbed.tasks.item import EVALUATED, Item, is_correct, make_item

__all__ = ["EVALUATED", "Item", "is_correct", "make_item"]
