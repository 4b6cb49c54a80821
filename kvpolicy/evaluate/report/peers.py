"""What a page says of peers: their versions, how they are compared, and what they hold and take beside ours."""

from collections.abc import Iterator

from kvpolicy.evaluate.harness.record import EvaluationRecord
from kvpolicy.evaluate.harness.setup import percent
from kvpolicy.evaluate.report.markdown import heading, row
from kvpolicy.evaluate.report.summary import Line, TaskSummary

_HOW = """**Peers** (`{names}`) ran in a process of their own, with
{versions}:
the same weights, token ids, continuations and measures, one row at a time. Those with a share are told to remove the
rest of the prompt (compression ratio = 1 - share). Of a peer, **held** is what the storages of its cache take right
after the prompt, as a share of a full cache's then; what comes behind the prompt it keeps in full. A policy of ours
holds its share *in the end*, with all that came behind the prompt. `transformers full` is the full cache in that
process: what it differs from ours by is no loss of a peer.
"""
_COSTS = ("prompt_share", "end_share", "prefill_seconds", "step_seconds")


def about_peers(record: EvaluationRecord) -> Iterator[str]:
    """What holds for all peers of a record; nothing if there are none."""
    cells = [cell for cell in record.cells if cell.peer]
    if not cells:
        return
    versions = sorted({f"{name} {version}" for cell in cells for name, version in cell.versions.items()})
    libraries = dict.fromkeys(cell.policy.partition(" ")[0] + " …" for cell in cells)
    yield _HOW.format(names="`, `".join(libraries), versions=", ".join(versions) or "versions that it did not tell")


def costs_beside_ours(task: TaskSummary) -> Iterator[str]:
    """A table of bytes and times, of ours and of peers; nothing where nothing was timed."""
    lines = [line for line in task.measured if all(name in line.costs for name in _COSTS)]
    if not lines:
        return
    yield "Bytes as shares of a full cache's at the same time, and times of one row, mean over what was timed:\n"
    yield from heading("cache", "asked to hold", "after the prompt", "in the end", "prompt s", "decode step ms")
    for line in sorted(lines, key=lambda line: (-1.0 if line.share is None else -line.share, line.peer)):
        yield _costs(line)
    yield ""


def _costs(line: Line) -> str:
    asked = "" if line.share is None else percent(line.share)
    prompt, end, prefill, step = (line.costs[name] for name in _COSTS)
    return row(line.policy, asked, f"{100 * prompt:.1f}%", f"{100 * end:.1f}%", f"{prefill:.2f}", f"{1000 * step:.1f}")
