"""Code: the model completes the test of a function in a long source file; the function is run to check it.

The source is that of Python's own library. The functions that are asked for are made here, so that no model knows them.
"""

import argparse
import ast
import inspect
import random
import textwrap
from collections.abc import Callable

import attrs

from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.tasks.case import Answer, Sources, TaskSizes, ids_of
from kvpolicy.evaluate.tasks.documents import sentence_window, with_hidden

_NAMES = ("harbour", "orchard", "lantern", "granite", "meadow", "copper", "falcon", "willow", "canyon", "ember")
_FUNCTION = "def {name}_code():\n    return {number}\n\n\n"
_TEST = "\n\ndef test_{name}_code():\n    assert {name}_code() == "
_TOKENS_A_NUMBER = 10


@attrs.frozen
class Code:
    """Four functions a file, at depths that are spread evenly; each is tested in a case of its own."""

    name: str
    seen: bool  # whether scorers see the test when they compress the file
    summary: str
    functions: int = 4
    metrics: tuple[str, ...] = ("correct",)

    def groups(self, sources: Sources, sizes: TaskSizes) -> tuple[tuple[Answer, ...], ...]:
        """One group a file. Raises EvaluationError when the library's source is too short, or not there."""
        blocks = _blocks()
        return tuple(self._file(sources, sizes, blocks, index) for index in range(sizes.documents))

    def _file(self, sources: Sources, sizes: TaskSizes, blocks: list[str], index: int) -> tuple[Answer, ...]:
        rng = random.Random(f"code {sizes.seed} {index}")  # noqa: S311 - makes questions
        names = rng.sample(_NAMES, self.functions)
        made = [_FUNCTION.format(name=name, number=rng.randrange(10**4, 10**5)) for name in names]
        taken = sum(len(ids_of(sources.tokenizer, function)) for function in made)
        file = sentence_window(sources.tokenizer, blocks, index, sizes.documents, sizes.length - taken)
        context = ids_of(sources.tokenizer, with_hidden(file, made, index, sizes.documents), start=True)
        chosen = rng.sample(range(self.functions), min(self.functions, sizes.questions))
        return tuple(self._case(sources, context, names[one], made[one]) for one in chosen)

    def _case(self, sources: Sources, context: list[int], name: str, function: str) -> Answer:
        test = ids_of(sources.tokenizer, _TEST.format(name=name))
        prompt, behind = ([*context, *test[:-1]], test[-1:]) if self.seen else (context, test)
        return Answer(tuple(prompt), tuple(behind), _TOKENS_A_NUMBER, {"correct": passes(function, f"{name}_code")})


def passes(source: str, name: str) -> Callable[[str], float]:
    """Whether a function returns what was written: the function is run, and what was written is read as a literal."""
    namespace: dict[str, Callable[[], object]] = {}
    exec(source, {"__builtins__": {}}, namespace)  # noqa: S102 - our own source
    expected = namespace[name]()

    def score(text: str) -> float:
        written = text.strip().splitlines()[:1]
        try:
            return float(bool(written) and ast.literal_eval(written[0].partition("#")[0].strip()) == expected)
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return 0.0

    return score


def _blocks() -> list[str]:
    """Functions of some modules of Python's library, each as source."""
    try:
        sources = [inspect.getsource(module) for module in (argparse, inspect, textwrap, ast)]
    except OSError as error:
        raise EvaluationError(f"code: the source of Python's library is not here: {error}") from error
    blocks = []
    for source in sources:
        lines = source.splitlines(keepends=True)
        body = ast.parse(source).body
        starts = [node.lineno - 1 for node in body if isinstance(node, ast.FunctionDef)]
        ends = [node.end_lineno or 0 for node in body if isinstance(node, ast.FunctionDef)]
        blocks += ["".join(lines[start:end]) + "\n\n" for start, end in zip(starts, ends, strict=True)]
    return blocks
