"""Tables of a number for each layer and head, read from lines of numbers or from scores of runs."""

import json
import os
import sys

import pytest
import torch

from kvpolicy.errors import CalibrationError
from kvpolicy.plan.head_table import read_head_table


@pytest.mark.parametrize("text", ["0.5\t1\t0\n1e-3\t.25\t1.0\n", "\n0.5 1 0\r\n\n  0.001\t 0.25 1\n\n"])
def test_a_line_is_a_layer_and_a_column_a_head(tmp_path, text):
    path = tmp_path / "heads.tsv"
    path.write_text(text)
    table = read_head_table(path)
    assert table.dtype == torch.float64
    assert table.tolist() == [[0.5, 1.0, 0.0], [0.001, 0.25, 1.0]]


def test_a_head_has_the_mean_over_its_runs_wherever_it_stands(tmp_path):
    """As in the files of arXiv:2404.15574 and HeadKV, of which some are in order and some are indented."""
    places = [(layer, head) for head in range(11, -1, -1) for layer in (0, 1)]
    runs = {f"{layer}-{head}": [(7 * layer + 3 * head + run) % 5 / 4 for run in range(3)] for layer, head in places}
    runs["1-3"] = [0, 1, 0]
    path = tmp_path / "heads.json"
    path.write_text("\n" + json.dumps(runs, indent=1))
    table = read_head_table(path)
    assert table.dtype == torch.float64
    expected = [[sum(runs[f"{layer}-{head}"]) / 3 for head in range(12)] for layer in (0, 1)]
    assert torch.allclose(table, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=0)


def test_means_of_the_largest_scores_are_finite(tmp_path):
    path = tmp_path / "heads.json"
    most = sys.float_info.max
    path.write_text(json.dumps({"0-0": [most] * 3, "0-1": [most, 0], "0-2": [0, 5e-324]}))
    assert read_head_table(path).tolist() == [[most, most / 2, 0]]


WRONG = {
    "": "must have a line of numbers for each layer: it is empty",
    "\n \n": "must have a line of numbers for each layer: it is empty",
    "1 2\n\n1 2 3\n": ":3: must have 2 numbers, as the first line: 3",
    "1 2\n1 nan\n": ":2:2: must be a finite number: 'nan'",
    "1 -inf": ":1:2: must be a finite number: '-inf'",
    "1,2\n": ":1:1: must be a finite number: '1,2'",
    "[1, 2]": ":1:1: must be a finite number: '[1,'",
    "{}": "must have scores for each layer and head: it is empty",
    ' {"0-0": [1]': "must be one JSON mapping: Expecting ',' delimiter: line 1 column 13 (char 12)",
    '{"0-0": [1]}\n{}': "must be one JSON mapping: Extra data: line 2 column 1 (char 13)",
    '{"0-0": ' + "[" * 10**6: "must be one JSON mapping: maximum recursion depth exceeded",
    '{"0-0": [1], "00-1": [1]}': "must name a layer and a head, such as '0-31': '00-1'",
    '{"0": [1]}': "must name a layer and a head, such as '0-31': '0'",
    '{"0--1": [1]}': "must name a layer and a head, such as '0-31': '0--1'",
    '{"0-1234567": [1]}': "must name a layer and a head, such as '0-31': '0-1234567'",
    '{"0-\u0661": [1]}': "must name a layer and a head, such as '0-31': '0-\u0661'",
    '{"0-0": [1], "0-1": [1], "0-0": [2]}': "'0-0': must be there once",
    '{"0-0": [1], "999999-999999": [2]}': "'0-1': is missing, of 1000000 layers of 1000000 heads",
    '{"0-0": [1], "1-1": [2], "0-1": [3]}': "'1-0': is missing, of 2 layers of 2 heads",
    '{"0-0": []}': "'0-0': must be a list of the scores of one run or more: an empty list",
    '{"0-0": 0.5}': "'0-0': must be a list of the scores of one run or more: 0.5",
    '{"0-0": {"0": 1}}': "'0-0': must be a list of the scores of one run or more: a mapping",
    '{"0-0": null}': "'0-0': must be a list of the scores of one run or more: null",
    '{"0-0": [1, -1e-9, 2]}': "'0-0': run 2: must be a finite number >= 0: -1e-09",
    '{"0-0": [NaN]}': "'0-0': run 1: must be a finite number >= 0: nan",
    '{"0-0": [1, Infinity]}': "'0-0': run 2: must be a finite number >= 0: inf",
    '{"0-0": [1e999]}': "'0-0': run 1: must be a finite number >= 0: inf",
    '{"0-0": [1' + "0" * 400 + "]}": "'0-0': run 1: must be a finite number >= 0: an integer of 1329 bits",
    '{"0-0": [1' + "0" * 9999 + "]}": "must be one JSON mapping: Exceeds the limit",
    '{"0-0": [true]}': "'0-0': run 1: must be a finite number >= 0: true",
    '{"0-0": ["1"]}': "'0-0': run 1: must be a finite number >= 0: '1'",
    '{"0-0": [[1]]}': "'0-0': run 1: must be a finite number >= 0: a list",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=range(len(WRONG)))
def test_what_is_no_table_is_said_with_its_place(tmp_path, text, message):
    path = tmp_path / "heads.tsv"
    path.write_text(text)
    with pytest.raises(CalibrationError) as caught:
        read_head_table(path)
    assert str(caught.value).startswith(f"{path}:")
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe1")
    with (tmp_path / "large").open("wb") as large:
        large.truncate(2**24 + 1)
    os.mkfifo(tmp_path / "pipe")
    told = {
        "none": "none: cannot be read: ",
        "binary": "binary: cannot be read: ",
        "large": "large: is larger than any table of heads",
        "pipe": "pipe: is no regular file",
        ".": ".: is no regular file",
        "a\0b": "cannot be read: ",
    }
    for name, message in told.items():
        with pytest.raises(CalibrationError) as caught:
            read_head_table(name)
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
