"""How right an answer is. The last word alone would not do: a trace that breaks off early can still end in it."""

from kvpolicy.evaluate.testbed import Item


def is_whole(item: Item, written: str) -> bool:
    """Whether all of the target was written, and nothing else."""
    return written == item.target


def before_mistake(item: Item, written: str) -> float:
    """The share of the target's words that were written before the first wrong one, 0 to 1."""
    target, words = item.target.split(), written.split()
    same = next((index for index, pair in enumerate(zip(target, words, strict=False)) if pair[0] != pair[1]), None)
    return (min(len(target), len(words)) if same is None else same) / len(target)
