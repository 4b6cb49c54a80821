"""Reports: intervals, who is best, and that pages and tables say what the record says."""

import io
import json
import re
from itertools import product

import numpy as np
import pytest
from rich.console import Console

from kvpolicy.evaluate.harness.setup import FULL, OTHER_PRECISION
from kvpolicy.evaluate.report.data import summary_data
from kvpolicy.evaluate.report.page import page_of
from kvpolicy.evaluate.report.statistics import differ, estimate
from kvpolicy.evaluate.report.summary import Summary
from kvpolicy.evaluate.report.table import table_of
from tests.support.evaluation_records import cell, record_of, two_tasks, with_peers

# -- intervals -------------------------------------------------------------------------------------------------


def exact(values, tail):
    """Bounds of the bootstrap distribution of the mean: all samples, each as likely as any other."""
    means = sorted(sum(sample) / len(values) for sample in product(values, repeat=len(values)))
    return means[int(tail * len(means))], means[min(len(means) - 1, int((1 - tail) * len(means)))]


@pytest.mark.parametrize("values", [[0.0, 1.0, 5.0], [0.1, 0.2, 0.7, 9.0], [1.0, 0.0, 0.0, 1.0, 1.0, 0.0]])
def test_intervals_are_those_of_all_resamples(values):
    """Up to what 2000 draws leave open: within the exact bounds for slightly smaller and larger tails."""
    found = estimate(values)
    (outer_low, outer_high), (inner_low, inner_high) = exact(values, 0.015), exact(values, 0.04)

    assert found.mean == pytest.approx(sum(values) / len(values))
    assert outer_low - 1e-9 <= found.low <= inner_low + 1e-9
    assert inner_high - 1e-9 <= found.high <= outer_high + 1e-9
    assert found.low < found.mean < found.high


def test_intervals_hold_the_truth_about_as_often_as_they_say():
    """Percentile intervals of thirty cases are a little too narrow, never far."""
    random = np.random.default_rng(7)
    found = [estimate(random.exponential(2.0, 30)) for _ in range(300)]
    held = np.mean([one.low <= 2.0 <= one.high for one in found])

    assert 0.87 <= held <= 0.98


def test_a_single_case_has_an_interval_without_width():
    assert (estimate([0.3]).low, estimate([0.3]).mean, estimate([0.3]).high) == (0.3, 0.3, 0.3)


@pytest.mark.parametrize(
    ("ours", "theirs", "expected"),
    [
        ([1, 2, 3, 4, 5], [1.1, 2.1, 3.1, 4.1, 5.1], True),
        ([5, 4, 3, 2, 1], [1, 2, 3, 4, 5], False),
        ([1, 2, 3, 4, 5], [1, 2, 3, 4, 5], False),
        ([1, 1, 1, 1, 1], [1, 1, 1, 1, 0], False),
        ([1] * 12, [0] * 6 + [1] * 6, True),
        ([1, 1], [0, 0], False),
        ([1, 1, 1], [0, 0, 0], True),
    ],
)
def test_contenders_are_told_apart_case_by_case(ours, theirs, expected):
    """A small difference that every case shows counts; a large one that comes from one case does not."""
    assert differ(ours, theirs) == differ(theirs, ours) == expected


# -- who is best -----------------------------------------------------------------------------------------------


def task_of(record, name):
    return next(task for task in Summary(record).tasks if task.task == name)


def names(lines):
    return [line.policy for line in lines]


def test_best_are_the_first_and_all_that_cannot_be_told_from_it():
    """Larger is better of answers, smaller of divergences; the full cache, in whatever precision, is never among."""
    needle, text = (task_of(two_tasks(), name) for name in ("needle", "text"))

    assert names(needle.best(0.25)) == ["good"]
    assert names(text.best(0.25)) == ["good", "bad"]
    assert names(text.best(0.125)) == ["good"]
    assert names(text.best(None)) == ["whole"]
    assert text.best(0.5) == ()
    for task in (needle, text):
        for share in (None, 0.25, 0.125):
            assert not {FULL, OTHER_PRECISION} & set(names(task.best(share)))


@pytest.mark.parametrize("seed", range(5))
def test_best_agrees_with_exact_enumeration_where_that_is_clear(seed):
    """Three groups of a case each; lines whose exact interval of differences is far from zero on one side."""
    random = np.random.default_rng(seed)
    values = {name: (random.random(3) + shift).tolist() for name, shift in (("a", 0), ("b", 0.2), ("c", 3), ("d", 0))}
    record = record_of(
        *(
            cell("text", group, name, 0.25, kl=[numbers[group]])
            for name, numbers in values.items()
            for group in range(3)
        )
    )
    best = names(task_of(record, "text").best(0.25))
    first = min(values, key=lambda name: sum(values[name]))

    assert best[0] == first
    for name, numbers in values.items():
        low, high = exact([one - other for one, other in zip(numbers, values[first], strict=True)], 0.025)
        if low > 0.05:
            assert name not in best
        if low < -0.05 and high > 0.05:
            assert name in best
    assert "c" not in best


def test_a_line_that_was_not_measured_on_the_groups_of_the_others_is_not_ranked():
    """Its one easy case would make it the best; and cases of different groups are no pairs."""
    cells = [cell("text", group, name, 0.25, kl=[1.0 + group]) for name in ("a", "b") for group in range(2)]
    easy = cell("text", 0, "easy", 0.25, kl=[0.001])
    summary = task_of(record_of(*cells, easy), "text")

    assert names(summary.best(0.25)) == ["a", "b"]
    assert names(summary.measured) == ["a", "b", "easy"]


def test_lines_have_the_cases_of_all_groups_in_the_order_of_the_groups():
    """Whatever the order in which processes measured them."""
    cells = [cell("text", group, "a", 0.25, held=held, kl=[group, -group]) for group, held in ((2, 250), (0, 150))]
    (line,) = task_of(record_of(*cells), "text").lines

    assert line.values["kl"] == (0, 0, 2, -2)
    assert line.held_share == pytest.approx(0.2)
    assert line.seconds == 180
    assert line.label == "a 25%"


@pytest.mark.parametrize(("right", "done"), [([0, 0, 1], False), ([1, 0], True), ([1, 1], True)])
def test_a_task_that_the_full_cache_cannot_do_says_nothing_about_policies(right, done):
    record = record_of(cell("needle", 0, FULL, None, correct=right), cell("needle", 0, "a", 0.25, correct=right))
    page, data = page_of(record), summary_data(record)

    assert task_of(record, "needle").tells_something is done
    assert data["tasks"]["needle"]["done_by_the_full_cache"] is done
    assert ("The full cache itself does not do this task" in page) is not done
    assert ("## Best at each share" in page) is done
    assert ("not done by" in terminal(record)) is not done


def test_predictions_can_always_be_compared():
    assert task_of(two_tasks(), "text").tells_something


def test_a_task_of_which_nothing_was_measured_is_shown_with_its_reasons():
    """Nor is the full cache said to fail at it."""
    cells = [cell("needles", 0, policy, share, refusal="no memory") for policy, share in ((FULL, None), ("a", 0.25))]
    page = page_of(record_of(*two_tasks().cells, *cells))

    assert "## needles" in page
    assert page.count("no memory") == 2
    assert "Not measured: a 25%: no memory" in page
    assert "does not do this task" not in page
    assert "refused" in terminal(record_of(*cells))
    assert summary_data(record_of(*cells))["tasks"]["needles"]["lines"][1]["refusal"] == "no memory"


# -- pages and tables ------------------------------------------------------------------------------------------


def terminal(record, width=80):
    console = Console(width=width, no_color=True, force_terminal=False)
    with console.capture() as captured:
        console.print(table_of(record))
    return captured.get()


def rows_of(page):
    return [[one.strip() for one in line.strip("|").split("|")] for line in page.splitlines() if line.startswith("| ")]


def test_the_page_says_what_the_record_says():
    page = page_of(two_tasks(), "tradeoff.png")
    rows = rows_of(page)

    assert ["good 25%", "25.0%", "**83% [50%, 100%]**"] in rows
    assert ["bad 25%", "25.0%", "0%"] in rows
    assert [FULL, "100.0%", "100%"] in rows
    assert ["bad 12.5%", "12.5%", "2.6 [2.5, 2.7]", "50%"] in rows
    assert ["good 25%", "25.0%", "**0.32 [0.31, 0.33]**", "50%"] in rows
    assert ["bad 25%", "25.0%", "**0.33 [0.32, 0.34]**", "50%"] in rows
    assert ["25%", "good (83%)", "good, bad (0.32)"] in rows
    assert ["12.5%", "", "good (0.615)"] in rows
    assert "Not measured: odd 25%: odd: 25% of 9 tokens leaves no room" in page
    assert "![Quality against bytes held](tradeoff.png)" in page
    assert "tradeoff.png" not in page_of(two_tasks())
    assert "6 cases" in page
    for word in ("2031-07-19", "71.2", "72.3", "73.4", "74.5", "an abacus", "75 threads", "123,456", "d16e57", "777"):
        assert word in page
    assert "Texts: diary, novel." in " ".join(page.split())


def test_every_number_of_the_page_follows_from_the_record():
    """Doubling the divergences, and halving the bytes, doubles and halves what the page says, and nothing else."""
    record = two_tasks()
    other = record_of(
        *(
            cell(one.task, one.group, one.policy, one.share, one.held_bytes / 2, one.refusal, **twice(one.values))
            for one in record.cells
        )
    )
    pairs = zip(rows_of(page_of(record)), rows_of(page_of(other)), strict=True)
    tables = [(ours, theirs) for ours, theirs in pairs if re.match(r"[\d.]+%$", ours[1])]

    assert len(tables) == 3 + 7
    for ours, theirs in tables:
        assert float(theirs[1].strip("%")) == pytest.approx(float(ours[1].strip("%")) / 2, abs=0.06)
        if len(ours) == 4:
            assert numbers_of(theirs[2]) == pytest.approx([2 * number for number in numbers_of(ours[2])], rel=0.01)
        assert theirs[3:] == ours[3:]


def twice(values):
    return {name: [2 * one for one in numbers] if name == "kl" else numbers for name, numbers in values.items()}


def numbers_of(text):
    return [float(one) for one in re.findall(r"[\d.]+(?:e-\d+)?", text)]


def long_record():
    """Three tasks with the longest names that there are."""
    contenders = [
        *((FULL, None), (OTHER_PRECISION, None), ("kivi4", None)),
        *((name, share) for share in (0.25, 0.125, 0.0625) for name in ("streaming_llm", "pyramidkv", "refused")),
    ]
    cells = []
    for task in ("text", "needles", "needles-unseen"):
        for policy, share in contenders:
            values = {"kl": [0.123456]} if task == "text" else {"correct": [0.0 if task == "needles-unseen" else 1.0]}
            refusal = "no room" if policy == "refused" else ""
            cells.append(cell(task, 0, policy, share, refusal=refusal, **({} if refusal else values)))
    return record_of(*cells)


def test_the_table_of_three_tasks_fits_eighty_columns():
    """Nothing is cut off: labels stay whole, every row has one line."""
    text = terminal(long_record())
    lines = [line for line in text.splitlines() if line.strip()]

    assert max(map(len, lines)) <= 80
    assert "…" not in text
    for label in ("full cache, other precision", "streaming_llm 12.5%", "pyramidkv 6.25%"):
        (row,) = (line for line in lines if line.startswith(label) or line.strip().startswith(label))
        assert "%" in row.partition(label)[2]
    (row,) = (line for line in lines if "streaming_llm 12.5%" in line)
    assert row.split()[2:] == ["12.5%", "0.123", "100%", "0%"]
    (row,) = (line for line in lines if "refused 25%" in line)
    assert row.split()[2:] == ["refused"] * 3


def test_names_are_shown_as_they_are():
    """A model in a folder with brackets in its name is no markup."""
    record = record_of(*two_tasks().cells, model={"name": "here/[bold]x[/y]", "dtype": "bfloat16"})

    assert "here/[bold]x[/y], bfloat16" in terminal(record, 100)


def test_the_data_for_programs_has_every_line():
    data = json.loads(json.dumps(summary_data(two_tasks())))
    needle, text = data["tasks"]["needle"], data["tasks"]["text"]

    assert data["model"]["name"] == "a/model"
    assert (needle["cases"], needle["metric"]) == (6, "correct")
    assert [(line["policy"], line["share"]) for line in needle["lines"]] == [
        (FULL, None),
        *((name, 0.25) for name in ("good", "bad", "odd")),
    ]
    assert needle["lines"][3] == {"policy": "odd", "share": 0.25, "refusal": "odd: 25% of 9 tokens leaves no room"}
    assert text["best"] == {"0.25": ["good", "bad"], "0.125": ["good"]}
    line = next(line for line in text["lines"] if line["policy"] == "good" and line["share"] == 0.125)
    assert line["kl"] == {"mean": pytest.approx(0.615), "low": pytest.approx(0.61), "high": pytest.approx(0.62)}
    assert line["held_share"] == 0.125


# -- peers -----------------------------------------------------------------------------------------------------


def test_peers_stand_next_to_ours_and_one_that_holds_everything_is_not_the_best():
    page = page_of(with_peers())

    assert "| ours 25% | 25.0% | 0.31 [0.3, 0.32] |" in page
    assert "| kvpress snapkv 25% | 25.0% | **0.21 [0.2, 0.22]** |" in page
    assert "| kvpress adakv 25% | 100.0% | 0.11 [0.1, 0.12] |" in page
    assert "Not measured: kvpress kvzip 25%: peer: killed" in page
    assert "**Peers** (`kvpress …`) ran in a process of their own, with\nkvpress 9.8, torch 7.6:\n" in page


def test_pages_with_peers_tell_what_was_asked_for_what_is_held_and_how_long_it_took():
    rows = [line for line in page_of(with_peers()).splitlines() if line.startswith("| ")]

    assert rows[-5:] == [
        "| cache | asked to hold | after the prompt | in the end | prompt s | decode step ms |",
        "| full cache |  | 100.0% | 100.0% | 1.00 | 1000.0 |",
        "| ours | 25% | 26.0% | 25.0% | 1.50 | 25.0 |",
        "| kvpress snapkv | 25% | 25.0% | 31.0% | 2.00 | 30.0 |",
        "| kvpress adakv | 25% | 100.0% | 100.0% | 2.00 | 30.0 |",
    ]


def test_tables_and_data_mark_peers():
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table_of(with_peers()))
    lines = {line["policy"]: line for line in summary_data(with_peers())["tasks"]["text"]["lines"]}

    assert "Of peers (kvpress, transformers): bytes right after the prompt" in " ".join(console.export_text().split())
    assert lines["kvpress snapkv"]["peer"] is True
    assert lines["kvpress snapkv"]["costs"]["end_share"] == 0.31
    assert lines["kvpress kvzip"] == {"policy": "kvpress kvzip", "share": 0.25, "peer": True, "refusal": "peer: killed"}
    assert "peer" not in lines["ours"]


def test_records_without_peers_say_nothing_of_them():
    assert "eers" not in page_of(two_tasks())
    assert "costs" not in json.dumps(summary_data(two_tasks()))
