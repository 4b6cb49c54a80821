"""The tables of the page of methods, on records that are made by hand."""

import attrs
import pytest

import kvpolicy
from kvpolicy.cli.quality.evaluate import loaded
from kvpolicy.evaluate.harness.setup import FULL
from tests.docs.method_tables import Results, bytes_and_times, loss_by_share, loss_by_task
from tests.docs.methods import ON_PROMPTS, REAL_MODEL, TESTBED, page_of
from tests.support.evaluation_records import cell, record_of

SECONDS = {"prompt_share": 0.3, "end_share": 0.25}


def timed(one, prefill, step):
    return attrs.evolve(one, costs={**SECONDS, "prefill_seconds": prefill, "step_seconds": step})


def of_texts():
    """Predictions of three texts at two shares, and answers about two; one policy has no share, one is a peer's."""
    kl = {("h2o", 0.25): (0.3, 0.31, 0.32), ("h2o", 0.0625): (0.5, 0.5, 0.5), ("tova", 0.25): (0.4, 0.41, 0.45)}
    cells = [timed(cell("text", 0, FULL, None, kl=[0.0]), 2.0, 0.5)]
    cells += [cell("text", group, *key, kl=[numbers[group]]) for key, numbers in kl.items() for group in range(3)]
    cells[1] = timed(cells[1], 2.5, 0.4)
    cells += [cell("text", group, "kivi4", None, held=390, kl=[0.01]) for group in range(3)]
    cells.append(attrs.evolve(cell("text", 0, "kvpress snapkv", 0.25, kl=[9.0]), peer=True))
    cells.append(cell("text", 0, "rkv", 0.25, refusal="no room"))
    cells += [cell("needle", 0, name, share, correct=[1, right]) for name, share, right in ANSWERS]
    return record_of(*cells)


ANSWERS = [(FULL, None, 1), ("h2o", 0.25, 0), ("tova", 0.25, 1)]


@pytest.fixture
def results():
    return Results(of_texts(), {"text": "KL", "needle": "Needles", "agent": "Agents"}, "there.md")


def lines(tables):
    return "\n".join(tables).strip("\n").split("\n")


def test_a_table_a_task_has_a_line_a_policy_and_a_column_a_share(results):
    """With intervals where cases differ; nothing of other libraries, and of what was refused."""
    assert lines(loss_by_task(results, ["h2o", "rkv", "tova", "snapkv"])) == [
        "**KL**, [a/model](there.md), contexts of about 777 tokens",
        "",
        "| policy | 25% | 6.25% |",
        "|---|---|---|",
        "| [h2o](#h2o) | 0.31 [0.3, 0.32] | 0.5 |",
        "| [tova](#tova) | 0.42 [0.4, 0.45] |  |",
        "",
        "**Needles**, [a/model](there.md), contexts of about 777 tokens",
        "",
        "| policy | 25% |",
        "|---|---|",
        "| [h2o](#h2o) | 50% [0%, 100%] |",
        "| [tova](#tova) | 100% |",
    ]


def test_a_policy_without_a_share_says_what_it_holds(results):
    table = lines(loss_by_task(results, ["h2o", "kivi4"]))
    assert table[2:6] == [
        "| policy | as it is | 25% | 6.25% |",
        "|---|---|---|---|",
        "| [h2o](#h2o) |  | 0.31 [0.3, 0.32] | 0.5 |",
        "| [kivi4](#kivi4) | 0.01 at 39% |  |  |",
    ]


def test_one_table_of_all_tasks_has_a_line_a_policy_and_share(results):
    assert lines(loss_by_share(results, ["h2o", "kivi4", "snapkv", "tova"])) == [
        "**KL, Needles**, [a/model](there.md), contexts of about 777 tokens",
        "",
        "| policy | bytes | KL | Needles |",
        "|---|---|---|---|",
        "| [h2o](#h2o) | 25% | 0.31 [0.3, 0.32] | 50% [0%, 100%] |",
        "|  | 6.25% | 0.5 |  |",
        "| [kivi4](#kivi4) | holds 39% | 0.01 |  |",
        "| [tova](#tova) | 25% | 0.42 [0.4, 0.45] | 100% |",
    ]


def test_times_are_multiples_of_those_of_the_full_cache(results):
    assert lines(bytes_and_times(results, ["h2o", "kivi4", "tova"])) == [
        "**Bytes and time** at 25% / 6.25%",
        "",
        "| policy | held | prompt | decode step |",
        "|---|---|---|---|",
        "| [h2o](#h2o) | 25% / 6.25% | 1.25 / - | 0.80 / - |",
        "| [kivi4](#kivi4) | 39% | - | - |",
        "| [tova](#tova) | 25% / - | - / - | - / - |",
    ]


def test_without_times_there_are_bytes_alone(results):
    untimed = record_of(*(attrs.evolve(one, costs={}) for one in results.record.cells))
    table = lines(bytes_and_times(attrs.evolve(results, record=untimed), ["tova"]))
    assert table[2:] == ["| policy | held |", "|---|---|", "| [tova](#tova) | 25% / - |"]


@pytest.mark.parametrize("table", [loss_by_task, loss_by_share, bytes_and_times])
def test_of_policies_that_were_not_measured_there_is_no_table(results, table):
    assert list(table(results, ["snapkv", "rkv"])) == []
    empty = attrs.evolve(results, record=record_of())
    assert list(table(empty, ["h2o"])) == []


def test_the_page_says_what_was_measured_and_where():
    testbed = record_of(
        *(cell("recall", 0, name, share, correct=[1, 1, 0]) for name, share in ((FULL, None), ("h2o", 0.25)))
    )
    page = page_of({REAL_MODEL: of_texts(), TESTBED: testbed})
    assert "| [h2o](#h2o) | 0.31 [0.3, 0.32] | 0.5 |" in page
    assert "| [h2o](#h2o) | 25% | 67% [0%, 100%] |" in page
    words = " ".join(page.split())
    assert "nats a token. 3 cases, [a/model](evaluation/smollm2-methods/evaluation.md)" in words
    assert "with the full cache: needle 100%." in words
    assert "with the full cache: recall 67%." in words
    assert "[rkv](#rkv)" not in page


def test_policies_that_leave_prompts_alone_are_shown_as_if_they_did_not():
    changed = ON_PROMPTS["rpc"]
    cells = [cell("text", 0, name, share, kl=[0.5]) for name, share in ((FULL, None), (changed, 0.25), ("rpc", 0.25))]
    page = page_of({REAL_MODEL: record_of(*cells), TESTBED: record_of()})

    assert "| [rpc](#rpc), on prompts | 0.5 |" in page
    assert "| [rpc](#rpc) |" not in page


@pytest.mark.parametrize("name", ON_PROMPTS)
def test_what_is_shown_of_them_can_be_measured(name):
    assert not kvpolicy.load(name).spec.compress.prefill
    changed = loaded(ON_PROMPTS[name]).spec
    assert changed.compress.prefill
    assert changed.budget.generated is None
    assert changed.score == kvpolicy.load(name).spec.score
