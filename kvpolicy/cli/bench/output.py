"""What a benchmark leaves behind: a record, a table on the terminal and in a file, a picture."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from kvpolicy.cli.console import line, out
from kvpolicy.cli.files import make_folder, write_text

if TYPE_CHECKING:
    from rich.table import Table

    from kvpolicy.bench.gates import Verdict
    from kvpolicy.bench.protocol.case import Case
    from kvpolicy.bench.protocol.result import Result


def opened(name: str, folder: Path, options: dict[str, Any], file: str = "") -> "Result":
    """An empty result that is kept in a file of the folder. Raises InputError when that cannot be."""
    from kvpolicy.bench.protocol.result import Result

    make_folder(folder, "--out ")
    result = Result(name, options, file=folder / f"{file or name}.json")
    result.write()
    return result


def finish(result: "Result") -> None:
    """Print the tables; write table and picture beside the record."""
    from kvpolicy.bench.report.picture import draw
    from kvpolicy.bench.report.tables import markdown, setting_of
    from kvpolicy.evaluate.plots import MISSING, can_plot

    result.write()
    file = result.file
    for part, cases in result.parts.items():
        out().print(table_of(part, cases))
    line(setting_of(result))
    for one in result.left_out:
        line(f"not measured: {one['what']}: {one['why']}", error=True)
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
    for place, heading in enumerate(HEADINGS):
        table.add_column(heading, justify="left" if place in (0, 2) else "right", no_wrap=True)
    before = None
    for row in rows_of(cases):
        if before not in (None, row[:2]):
            table.add_section()
        before = row[:2]
        table.add_row(*row)
    return table


def print_verdicts(verdicts: "list[Verdict]") -> None:
    """One line a gate."""
    for one in verdicts:
        judged = one.threshold is not None
        bound = f"{'at most' if one.at_most else 'at least'} {one.threshold:.3g}" if judged else "no claim"
        spread = "" if one.noise is None else f", noise {one.noise:.1%}"
        outcome = "told" if not judged else "pass" if one.passed else "FAIL"
        line(f"{outcome}  {one.gate}: {one.value:.3g} ({bound}{spread})  {one.claim}")
