"""The table of `kvpolicy demo`."""

from collections.abc import Sequence
from statistics import mean

from rich.table import Table

from kvpolicy.evaluate.answers import SEEN, UNSEEN
from kvpolicy.evaluate.compare import Outcome
from kvpolicy.evaluate.setup import Setup
from kvpolicy.plan.units import human_bytes


def table_of(setup: Setup, outcomes: Sequence[Outcome]) -> Table:
    """One line a contender: accuracy on each task, bytes held by one sequence, speed."""
    tasks = setup.tasks
    title = f"Testbed model, {setup.items} questions a task of {setup.length} tokens, seed {setup.seed}, greedy"
    table = Table(
        title=title,
        caption=_CAPTION.format(task=_slowest(outcomes), seen=_SEEN[setup.question]),
        caption_justify="left",
    )
    table.add_column("contender", no_wrap=True)
    for heading in (*tasks, "KV held", "of full", "peak", "queries", "tok/s"):
        table.add_column(heading, justify="right")
    share = None
    for contender in setup.contenders:
        if contender.share != share:
            table.add_section()
        share = contender.share
        by_task = {one.task: one for one in outcomes if one.contender == contender}
        table.add_row(contender.label, *(f"{by_task[task].accuracy:.0%}" for task in tasks), *_costs(by_task, outcomes))
    return table


_SEEN = {
    SEEN: "Scorers see the question when they compress the context (that of reasoning only starts the trace).",
    UNSEEN: "Scorers do not see the question when they compress the context.",
}
_CAPTION = (
    "{seen} All answers are written after that. "
    "KV held: storage of one sequence's entries when its answer is written, slack included, mean over the tasks. "
    "peak: the most at any time, share of full, while the prompt's layers are compressed one after another. "
    "queries: held for the scorers, on top. tok/s: tokens written a second, all rows, on {task}."
)


def _costs(by_task: dict[str, Outcome], outcomes: Sequence[Outcome]) -> tuple[str, ...]:
    every = by_task.values()
    return (
        human_bytes(mean(one.held_bytes for one in every)),
        f"{mean(one.held_share for one in every):.1%}",
        f"{mean(one.peak_bytes / one.full_bytes for one in every):.0%}",
        human_bytes(mean(one.window_bytes for one in every)),
        f"{by_task[_slowest(outcomes)].decode_speed:.0f}",
    )


def _slowest(outcomes: Sequence[Outcome]) -> str:
    """The task with the longest answers, where the speed of writing means something: the last one by design."""
    return outcomes[-1].task
