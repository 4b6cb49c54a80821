"""Tables of a number for each layer and KV head, read from text."""

import os

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


WRONG = {
    "": "must have a line of numbers for each layer: it is empty",
    "\n \n": "must have a line of numbers for each layer: it is empty",
    "1 2\n\n1 2 3\n": ":3: must have 2 numbers, as the first line: 3",
    "1 2\n1 nan\n": ":2:2: must be a finite number: 'nan'",
    "1 -inf": ":1:2: must be a finite number: '-inf'",
    "1,2\n": ":1:1: must be a finite number: '1,2'",
}


@pytest.mark.parametrize(("text", "message"), WRONG.items(), ids=range(len(WRONG)))
def test_what_is_no_table_is_said_with_its_place(tmp_path, text, message):
    path = tmp_path / "heads.tsv"
    path.write_text(text)
    with pytest.raises(CalibrationError) as caught:
        read_head_table(path)
    assert str(caught.value).startswith(f"{path}:")
    assert str(caught.value).endswith(message)


def test_files_that_are_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "binary").write_bytes(b"\xff\xfe1")
    (tmp_path / "large").write_bytes(b"1 " * 2**20)
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
