"""The page and the pictures of an evaluation: numbers from the record alone; what is committed is current."""

import copy
import json
from pathlib import Path

import pytest
from kvpolicy.evaluate.table.page import page_of, percent
from kvpolicy.evaluate.table.pictures import ACCURACY, TIME, draw
from kvpolicy.evaluate.table.table_data import FORM

DOCS = Path(__file__).parents[3] / "docs"
PNG = b"\x89PNG"


def line(policy, kind, share, right, error, **more):
    task = {"items": 4, "whole_answers_right": 1, "accuracy": 0.25, "share_before_first_mistake": right}
    return {
        "policy": policy,
        "kind": kind,
        "share": share,
        "held_share": 0.123,
        "read_share": 0.234,
        "bytes_per_entry": 132.5,
        "bytes_per_entry_by_formula": 133.5,
        "bytes_per_entry_of_a_full_cache": 128.0,
        "tasks": {"recall": task, "reasoning": task},
        "attention_error": {"mean": error, "worst_layer": 0.777},
        **more,
    }


def timed(policy, length, ratio):
    return {
        "policy": policy, "length": length, "full_ms": 4.0, "step_ms": 1.0, "compression_ms": 0.5, "ratio": ratio
    }  # fmt: skip


@pytest.fixture
def record():
    decode = {"pairs": 15, "layers": 4, "hidden": 512, "heads": 8, "kv_heads": 2, "dtype": "float32", "share": 0.125}
    return {
        "form": FORM,
        "date": "2026-11-22",
        "seconds": 610,
        "versions": {"kvpolicy": "0.1.0", "torch": "2.13.0", "transformers": "5.23.0", "python": "3.11.7"},
        "machine": {"processor": "AMD EPYC", "threads": 2},
        "setup": {
            "tasks": {
                "recall": {"question_visible_to_scorers": True},
                "reasoning": {"question_visible_to_scorers": False},
            },
            "seed": 7,
            "parameters": 2323200,
            "dtype": "bfloat16",
            "items_per_task": 4,
            "tokens_per_item": 1024,
            "tokens_of_the_shortest_item": 1005,
            "shares": [0.25, 0.125],
            "error_items_per_task": 2,
            "error_steps": 64,
            "decode": {**decode, "lengths": [1024, 4096]},
        },
        "policies": [
            line("full", "whole", 1.0, 1.0, 0.001),
            line("snapkv", "budget", 0.25, 0.5, 0.2),
            line("quest", "read", 0.125, 0.75, 0.3),
            {"policy": "odd", "kind": "budget", "share": 0.25, "refusal": "it does not fit"},
        ],
        "mergers": [
            line("snapkv", "budget", 0.25, 0.5, 0.2, merge="drop"),
            line("snapkv", "budget", 0.25, 0.6, 0.1, merge="keepkv"),
            line("snapkv", "budget", 0.25, 0.4, 0.2, merge="cam"),
        ],
        "decode": [timed("full", 1024, 0.9), timed("full", 4096, 0.8), timed("snapkv", 4096, 0.375)],
    }


def rows(page):
    return [[cell.strip() for cell in row.strip("|").split("|")] for row in page.splitlines() if row.startswith("| ")]


def test_each_line_is_a_row_of_its_numbers(record):
    """Share, bytes by measure and formula, answers, errors."""
    found = rows(page_of(record))
    answers = "25% (50%)"

    assert ["full", "all", "12.3%", "132.5 (133.5)", "25% (100%)", "25% (100%)", "0.001", "0.777"] in found
    assert ["snapkv", "25%", "12.3%", "132.5 (133.5)", answers, answers, "0.200", "0.777"] in found
    assert found[3][:2] == ["quest", "reads 23.4%"]
    assert ["full", "0.90 (1.5 of 4.0 ms)", "0.80 (1.5 of 4.0 ms)"] in found
    assert ["snapkv", "", "0.38 (1.5 of 4.0 ms)"] in found


def test_mergers_that_win_are_bold_and_losses_are_counted(record):
    """More right, fewer right, smaller error, larger error than dropping."""
    found = rows(page_of(record))

    assert ["snapkv", "25%", "**keepkv**", "25% (60%)", "25% (60%)", "0.100", "0.777"] in found
    assert ["keepkv", "1", "0", "1", "0"] in found
    assert ["cam", "0", "1", "0", "0"] in found
    assert not any(row[2] in ("**drop**", "**cam**") for row in found if len(row) > 2)


def test_the_setting_is_stated(record):
    """Machine, versions, seed, sizes, and what could not be measured."""
    page = page_of(record)

    for part in ("2026-11-22", "torch 2.13.0", "2 threads", "seed 7", "10 minutes", "2,323,200", "4 held-out items"):
        assert part in page
    assert "a full cache takes 128" in page
    assert "in: `recall`." in page
    assert "Not measured: odd 25%: it does not fit" in page
    assert "2 items a task, the newest 64" in page
    assert "one item is 25.0% of a task" in page


def test_numbers_follow_the_record(record):
    """Another record, another page."""
    other = copy.deepcopy(record)
    other["policies"][1]["held_share"] = 0.5

    assert page_of(other) != page_of(record)
    assert percent(0.0625) == "6.25%"


def test_a_record_without_mergers_has_no_such_table(record):
    """When none of the base policies is evaluated."""
    assert "Merging" not in page_of({**record, "mergers": []})


def test_pictures_are_drawn(record, tmp_path):
    """Two files; refused lines have no points."""
    draw(record, tmp_path)

    for name in (ACCURACY, TIME):
        assert (tmp_path / name).read_bytes().startswith(PNG)


def test_committed_page_is_that_of_the_committed_record():
    """And its pictures are there."""
    record = json.loads((DOCS / "images" / "evaluation.json").read_text("utf-8"))
    page = (DOCS / "reference" / "evaluation.md").read_text("utf-8")

    assert page == page_of(record), "run: kvpolicy evaluate --from docs/images/evaluation.json --markdown …"
    assert (DOCS / "images" / ACCURACY).exists()
    assert (DOCS / "images" / TIME).exists()
