"""Rows of tables in Markdown."""

from collections.abc import Iterator


def heading(*cells: str) -> Iterator[str]:
    """The first two lines of a table."""
    yield row(*cells)
    yield "|" + "---|" * len(cells)


def row(*cells: str) -> str:
    """A line of a table."""
    return f"| {' | '.join(cells)} |"
