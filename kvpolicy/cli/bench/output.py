"""Output of a benchmark: a JSON file, a table on the terminal and in a file, a picture."""

from typing import TYPE_CHECKING

from kvpolicy.cli.terminal.console import line, out
from kvpolicy.cli.terminal.files import write_text

if TYPE_CHECKING:
    from rich.table import Table

    from kvpolicy.bench.protocol.case import Case
    from kvpolicy.bench.protocol.result import Result
    from kvpolicy.bench.report.verdict import Verdict


def finish(result: "Result") -> None:
    """Print the tables; write table and picture beside the record."""
    from kvpolicy.bench.report.picture import draw
    from kvpolicy.bench.report.tables import markdown, setting_of
    from kvpolicy.evaluate.report.plots import MISSING, can_plot

    result.write()
    file = result.file
    for part, cases in result.parts.items():
        out().print(table_of(part, cases))
    line(setting_of(result))
    for missing in result.left_out:
        line(f"not measured: {missing['what']}: {missing['why']}", error=True)
    if file is None:
        return
    write_text(file.with_suffix(".md"), markdown(result))
    drawn = can_plot() and draw(result, file.with_suffix(".png"))
    if not can_plot():
        line(MISSING, error=True)
    names = [file.name, file.with_suffix(".md").name, *([file.with_suffix(".png").name] if drawn else [])]
    line(f"written to {file.parent}: {', '.join(names)}", error=True)


def table_of(title: str, cases: "list[Case]") -> "Table":
    """One line per variant, a section per case."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    from kvpolicy.bench.report.tables import HEADINGS, rows_of

    table = Table(title=title, box=SIMPLE_HEAD, padding=0)
    for column, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if column in (0, 2) else "right", no_wrap=True)
    before = None
    for row in rows_of(cases):
        if before not in (None, row[:2]):
            table.add_section()
        before = row[:2]
        table.add_row(*row)
    return table


def print_verdicts(verdicts: "list[Verdict]") -> None:
    """One line a gate."""
    for verdict in verdicts:
        judged = verdict.threshold is not None
        bound = f"{'at most' if verdict.at_most else 'at least'} {verdict.threshold:.3g}" if judged else "no claim"
        kind = "" if verdict.claimed else ", an aim"
        floor = "" if verdict.floor is None else f", floor {verdict.floor:.3g}"
        spread = "" if verdict.noise is None else f", noise {verdict.noise:.1%}"
        outcome = "told" if not judged else "pass" if verdict.met else "FAIL" if verdict.claimed else "miss"
        line(f"{outcome}  {verdict.gate}: {verdict.value:.3g} ({bound}{kind}{floor}{spread})  {verdict.claim}")
