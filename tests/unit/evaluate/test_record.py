"""The record of a run that is killed goes on where it stopped; whatever else stands in its place is left alone."""

import json
import zlib
from fractions import Fraction
from unittest.mock import Mock

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import kvpolicy
from kvpolicy.errors import InputError
from kvpolicy.evaluate.harness.calibrations import Calibrations
from kvpolicy.evaluate.harness.record import Cell, RecordFile, read_record
from kvpolicy.evaluate.harness.run import Evaluation
from kvpolicy.evaluate.harness.setup import EvaluationSetup
from kvpolicy.evaluate.tasks.case import Sources, TaskSizes
from tests.support.examples import examples

HEAD = {
    "date": "2026-01-01",
    "versions": {"kvpolicy": "1"},
    "machine": {"threads": 1},
    "model": {"name": "ein Modell — ü", "digest": "ab"},
    "texts": {},
    "sizes": {"length": 128},
    "policies": {"snapkv": "1f", "rkv": "2e"},
    "shares": [0.25, 0.125],
    "tasks": ["recall", "tracking"],
}


@pytest.fixture(scope="module")
def evaluation(tiny):
    """Two tasks of two groups, five contenders: twenty cells."""
    policies = tuple(map(kvpolicy.load, ("snapkv", "streaming_llm")))
    sizes = TaskSizes(documents=17, length=128)
    setup = EvaluationSetup(policies, ("recall", "tracking"), (Fraction(1, 4), Fraction(1, 8)), sizes)
    return Evaluation(tiny[0], Sources(tiny[1], ()), setup, Calibrations(tiny[0], lambda: None))


def fake(unit, contender):
    """A cell with numbers that follow from its place, one of them refused, with what JSON has to escape."""
    number = zlib.crc32(repr((unit.task, unit.group, contender.key)).encode()) / 7
    cell = Cell(unit.task, unit.group, *contender.key, prompt_tokens=128, held_bytes=number)
    if contender.name == "snapkv" and unit.group:
        return attrs.evolve(cell, refusal='has "no" room\n\u2028für\r einen')
    return attrs.evolve(cell, values={"correct": [0.0, number], "prefix": [1.0, 0.1]}, texts=["a\nb", "\u2028ü 🙂"])


def go_on(evaluation, path, most=100):
    """Measure at most so many of the cells that the file lacks; all that were measured."""
    record, measured = RecordFile(path, HEAD), []
    for unit in evaluation.units({cell.key for cell in record.record.cells}):
        for contender in unit.contenders:
            if len(measured) < most:
                measured.append(fake(unit, contender))
                record.add(measured[-1])
    assert record.record == read_record(path)
    return measured


def in_file(path):
    """The lines of a file as JSON, the first one apart."""
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b""
    head, *cells = map(json.loads, lines)
    return head, cells


def keys(cells):
    return [(cell["task"], cell["group"], cell["policy"], cell["share"]) for cell in cells]


@settings(max_examples=examples(25))
@given(data=st.data())
def test_a_run_that_was_cut_off_goes_on_without_losing_or_repeating_a_cell(evaluation, tmp_path_factory, data):
    """Cut anywhere within its last line, the head included; what was whole is neither measured nor written again."""
    folder = tmp_path_factory.mktemp("run")
    whole, path = folder / "whole.jsonl", folder / "cut.jsonl"
    all_cells = go_on(evaluation, whole)
    if data.draw(st.integers(0, 4)) == 0:
        RecordFile(path, HEAD)
    else:
        go_on(evaluation, path, data.draw(st.integers(1, len(all_cells))))
    before = path.read_bytes()
    start = before[:-1].rfind(b"\n") + 1
    path.write_bytes(before[: data.draw(st.integers(start, len(before) - 1))])
    measured = go_on(evaluation, path)

    assert path.read_bytes() == whole.read_bytes()
    assert measured == all_cells[len(all_cells) - len(measured) :]
    assert len(measured) == len(all_cells) - max(0, before.count(b"\n") - 2)
    head, cells = in_file(path)
    assert {name: head[name] for name in HEAD} == HEAD
    assert len(set(keys(cells))) == len(cells) == 20
    assert go_on(evaluation, path) == []


def test_what_is_read_is_what_was_written(evaluation, tmp_path):
    path = tmp_path / "cells.jsonl"
    measured = go_on(evaluation, path)
    record = read_record(path)

    assert record.head == HEAD
    assert [attrs.asdict(cell) for cell in record.cells] == [attrs.asdict(cell) for cell in measured]
    assert [cell.task for cell in record.of("tracking")] == ["tracking"] * 10


def test_a_cell_is_on_disk_before_the_next_one_is_measured(evaluation, tmp_path):
    path = tmp_path / "cells.jsonl"
    record = RecordFile(path, HEAD)
    (unit, *_) = evaluation.units()
    for count, contender in enumerate(unit.contenders, 1):
        record.add(fake(unit, contender))
        assert len(in_file(path)[1]) == count


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"policies": {"rkv": "another digest"}}, "policies of the same name differ"),
        ({"model": {"name": "other"}, "sizes": {"length": 9}}, "model, sizes differ"),
        ({"tokens_at_once": 32}, "tokens_at_once differ"),
    ],
)
def test_the_record_of_another_run_is_refused_and_left_alone(evaluation, tmp_path, change, named):
    path = tmp_path / "cells.jsonl"
    go_on(evaluation, path, 3)
    path.write_bytes(path.read_bytes()[:-9])
    before = path.read_bytes()

    with pytest.raises(InputError, match=rf"is the record of another run \({named}\)") as found:
        RecordFile(path, {**HEAD, **change})
    assert "\n" not in str(found.value)
    assert path.read_bytes() == before


def test_a_run_may_go_on_another_day_on_another_machine(evaluation, tmp_path):
    path = tmp_path / "cells.jsonl"
    go_on(evaluation, path, 3)
    record = RecordFile(path, {**HEAD, "date": "2027-05-05", "versions": {}, "machine": {"threads": 8}})

    assert len(record.record.cells) == 3
    assert record.record.head["date"] == "2026-01-01"


def test_policies_shares_and_tasks_are_added_and_no_cell_is_touched(evaluation, tmp_path):
    path = tmp_path / "cells.jsonl"
    go_on(evaluation, path)
    _, *cells = path.read_bytes().splitlines(keepends=True)
    added = {"policies": {"h2o": "3d", "rkv": "2e"}, "shares": [0.5, 0.25], "tasks": ["needle"]}
    record = RecordFile(path, {**HEAD, **added}).record

    head, _ = in_file(path)
    assert head["policies"] == {"snapkv": "1f", "rkv": "2e", "h2o": "3d"}
    assert (head["shares"], head["tasks"]) == ([0.25, 0.125, 0.5], ["recall", "tracking", "needle"])
    assert path.read_bytes().splitlines(keepends=True)[1:] == cells
    assert record == read_record(path)
    assert [file.name for file in tmp_path.iterdir()] == ["cells.jsonl"]

    # The first run goes on with it as before, and so does a run of less.
    before = path.read_bytes()
    assert go_on(evaluation, path) == []
    RecordFile(path, {**HEAD, "policies": {}, "shares": [0.5], "tasks": []})
    assert path.read_bytes() == before


def test_a_run_that_is_killed_while_a_policy_is_added_loses_nothing(evaluation, tmp_path, monkeypatch):
    path = tmp_path / "cells.jsonl"
    go_on(evaluation, path, 7)
    before = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            RecordFile(path, {**HEAD, "shares": [0.5]})
    assert path.read_bytes() == before

    assert RecordFile(path, {**HEAD, "shares": [0.5]}).record.head["shares"] == [0.25, 0.125, 0.5]
    assert path.read_bytes().splitlines()[1:] == before.splitlines()[1:]


FIRST = json.dumps({"kind": "run", "form": 2, **HEAD}) + "\n"
CELL = {"kind": "cell", "task": "recall", "group": 0, "policy": "rkv", "share": 0.5}
DAMAGED = {
    "prose": "These are my notes.\n",
    "prose without an end": "These are my notes.",
    "another form": FIRST.replace('"form": 2', '"form": 1'),
    "no head": json.dumps(CELL) + "\n",
    "a head that lacks something": '{"kind": "run", "form": 2, "date": ""}\n',
    "two heads": FIRST + FIRST,
    "a line that is no object": FIRST + "[1, 2]\n",
    "a line that is a number": FIRST + "7\n",
    "a line that is no JSON": FIRST + '{"kind": "cell", "task"\n',
    "an empty line": FIRST + "\n" + json.dumps(CELL) + "\n",
    "a cell with too much": FIRST + json.dumps({**CELL, "colour": 1}) + "\n",
    "a cell with too little": FIRST + '{"kind": "cell", "task": "recall"}\n',
    "values in no order": FIRST + json.dumps({**CELL, "values": [1]}) + "\n",
    "values that are words": FIRST + json.dumps({**CELL, "values": {"kl": ["much"]}}) + "\n",
    "values without end": FIRST + json.dumps({**CELL, "values": {"kl": 1}}) + "\n",
    "endless brackets": "[" * 100_000 + "\n",
    "a binary file": b"\x89PNG\r\n\x1a\n\x00\xff\xfe\n",
    "nulls": b"\x00" * 64,
}


@pytest.mark.parametrize("content", DAMAGED.values(), ids=DAMAGED)
def test_a_damaged_file_is_one_line_of_error_and_left_alone(tmp_path, content):
    path = tmp_path / "cells.jsonl"
    content = content.encode() if isinstance(content, str) else content
    path.write_bytes(content)

    for read in (read_record, lambda file: RecordFile(file, HEAD)):
        with pytest.raises(InputError, match=r"cells\.jsonl: is not a record of kvpolicy evaluate: ") as found:
            read(path)
        assert "\n" not in str(found.value)
        assert path.read_bytes() == content


def test_an_empty_file_is_no_record_to_read_but_a_place_to_write(tmp_path):
    path = tmp_path / "cells.jsonl"
    path.touch()
    with pytest.raises(InputError, match="is not a record"):
        read_record(path)
    RecordFile(path, HEAD)
    assert read_record(path).cells == ()


def test_a_place_that_cannot_be_read_or_written_is_an_error(tmp_path):
    with pytest.raises(InputError, match="nothing: cannot be read: No such file"):
        read_record(tmp_path / "nothing")
    with pytest.raises(InputError, match="is no regular file"):
        RecordFile(tmp_path, HEAD)
    with pytest.raises(InputError, match="cells: cannot be written: No such file"):
        RecordFile(tmp_path / "not there" / "cells", HEAD)


def test_a_disk_that_is_full_is_an_error(evaluation, tmp_path):
    record = RecordFile(tmp_path / "cells.jsonl", HEAD)
    (unit, *_) = evaluation.units()
    record.path = tmp_path / "full"
    record.path.symlink_to("/dev/full")
    with pytest.raises(InputError, match="full: cannot be written: No space left"):
        record.add(fake(unit, unit.contenders[0]))
    assert record.record.cells == ()
