"""The table of `kvpolicy demo`."""

from collections.abc import Sequence
from statistics import mean

from rich.box import SIMPLE_HEAD
from rich.table import Table

from kvpolicy.evaluate.answers import SEEN, UNSEEN
from kvpolicy.evaluate.compare import Outcome
from kvpolicy.evaluate.setup import Setup
from kvpolicy.plan.explain.units import human_bytes


def table_of(setup: Setup, outcomes: Sequence[Outcome]) -> Table:
    """One line a contender: accuracy on each task, bytes held by one sequence, speed."""
    title = f"Testbed model, {setup.items} questions a task of {setup.length} tokens, seed {setup.seed}, greedy"
    table = Table(title=title, caption=_caption(setup, outcomes), caption_justify="left", box=SIMPLE_HEAD, padding=0)
    table.add_column("contender", no_wrap=True)
    for heading in (*setup.tasks, "KV held", "share", "peak", "tok/s"):
        table.add_column(heading, justify="right", no_wrap=True)
    share = None
    for contender in setup.contenders:
        if contender.share != share:
            table.add_section()
        share = contender.share
        by_task = {outcome.task: outcome for outcome in outcomes if outcome.contender == contender}
        right = (_right(by_task[task]) for task in setup.tasks)
        table.add_row(contender.label, *right, *_costs(by_task, setup.tasks[-1]))
    return table


_SEEN = {
    SEEN: "Scorers see the question when they compress the context, except that of reasoning.",
    UNSEEN: "Scorers do not see the question when they compress the context.",
}
_CAPTION = """{seen} Every answer is written after that.
Answers right in every word; in brackets, the share of an answer before its first mistake.
KV held: storage of one sequence's entries at the end, slack included, mean over the tasks.
share, peak: of the full cache; peak is while a prompt is compressed layer by layer.
Queries that scorers observe come on top: {window} at most.
tok/s: on {task}, all rows of a batch together, until the last is done."""


def _caption(setup: Setup, outcomes: Sequence[Outcome]) -> str:
    window = human_bytes(max(outcome.window_bytes for outcome in outcomes))
    return _CAPTION.format(seen=_SEEN[setup.question], window=window, task=setup.tasks[-1])


def _right(outcome: Outcome) -> str:
    """Whole answers, and how far the others got where that is more."""
    whole, part = f"{outcome.accuracy:.0%}", f"{outcome.before_mistake:.0%}"
    return whole if whole == part else f"{whole} ({part})"


def _costs(by_task: dict[str, Outcome], writing: str) -> tuple[str, ...]:
    """The last task has the longest answers, so that the speed of writing means something there."""
    every = by_task.values()
    return (
        human_bytes(mean(outcome.held_bytes for outcome in every)),
        f"{mean(outcome.held_share for outcome in every):.0%}",
        f"{mean(outcome.peak_bytes / outcome.full_bytes for outcome in every):.0%}",
        f"{by_task[writing].decode_speed:.0f}",
    )
