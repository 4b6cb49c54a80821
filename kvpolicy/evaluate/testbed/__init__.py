"""The testbed: a small trained model and its tasks, to compare policies offline on any machine."""

from kvpolicy.evaluate.testbed.load import load_testbed
from kvpolicy.evaluate.testbed.tasks import EVALUATED, Item, is_correct, make_item

__all__ = ["EVALUATED", "Item", "is_correct", "load_testbed", "make_item"]
