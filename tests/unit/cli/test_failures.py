"""Whatever fails while a command runs is told in one line, with exit code 2."""

import json
import os
import subprocess
import sys

import pytest

from kvpolicy.cli.policy import policies
from kvpolicy.cli.terminal import files
from kvpolicy.cli.terminal.prompt import read_prompt
from kvpolicy.errors import InputError
from kvpolicy.evaluate.data import files as read_files

UNTOLD = type("UntoldError", (Exception,), {"__str__": lambda self: 1 / 0})


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(28, "No space left on device"), "No space left on device"),
        (PermissionError(13, "Permission denied", "x.yaml"), "x.yaml: Permission denied"),
        (RuntimeError("CUDA error: device-side assert\nmore\nlines"), "RuntimeError: CUDA error: device-side assert"),
        (ValueError("x" * 10**6), "ValueError: xxx"),
        (ZeroDivisionError(), "ZeroDivisionError"),
        (MemoryError(), "MemoryError"),
        (RecursionError("maximum recursion depth exceeded"), "RecursionError: maximum"),
        (UNTOLD(), "UntoldError: <UntoldError, whose text cannot be read: ZeroDivisionError>"),
        (KeyError("\x1b[31m"), "KeyError: "),
    ],
    ids=repr,
)
def test_error_of_the_system_or_of_a_library_is_one_line(kv, monkeypatch, error, message):
    def fail(_found):
        raise error

    monkeypatch.setattr(policies, "_table", fail)
    result = kv("list")

    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith(f"error: {message}")
    assert len(result.stderr.splitlines()) == 1
    assert len(result.stderr) < 450
    assert "\x1b" not in result.stderr
    assert kv("--traceback", "list").exception is error


def test_interrupt_is_one_line_and_130(kv, monkeypatch):
    def interrupt(_found):
        raise KeyboardInterrupt

    monkeypatch.setattr(policies, "_table", interrupt)
    result = kv("list")

    assert (result.exit_code, result.stdout, result.stderr) == (130, "", "error: interrupted\n")


@pytest.mark.parametrize("columns", ["0", "1", "", "-3", "wide"])
def test_no_width_is_too_small_to_print(kv, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)

    assert "streaming_llm" in kv("list").stdout
    monkeypatch.setenv("COLUMNS", columns)
    assert "Usage: kvpolicy" in kv("--help").stdout


def test_configuration_without_heads_is_refused(kv, tmp_path):
    for name, numbers in {"heads": {"num_attention_heads": 0}, "kv": {"num_key_value_heads": 0}}.items():
        (tmp_path / name).mkdir()
        config = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, **numbers}
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        result = kv("plan", "rkv", "--model", tmp_path / name)

        assert result.exit_code in ((2,) if name == "heads" else (0, 2)), result.stdout
        assert len(result.stderr.splitlines()) == (result.exit_code == 2)


def test_prompt_is_what_the_file_holds(tmp_path):
    file = tmp_path / "prompt.txt"
    for data, text in (
        (b"\xef\xbb\xbfone\r\ntwo\n", "one\r\ntwo\n"),
        (b"one\n\n", "one\n\n"),
        (" é…".encode(), " é…"),
        (b"\xef\xbb\xbf\xef\xbb\xbfone", "\ufeffone"),
    ):
        file.write_bytes(data)
        assert read_prompt(None, file) == text
    assert read_prompt("one\n", None) == "one\n"


@pytest.mark.timeout(60)
def test_what_is_no_text_file_is_refused_without_waiting(tmp_path, monkeypatch):
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(read_files, "LARGEST", 2**20)
    (tmp_path / "long.txt").write_bytes(b"x" * (2**20 + 1))
    (tmp_path / "latin.txt").write_bytes(b"\xff\xfe")
    for path, message in (
        (tmp_path / "pipe", "is no regular file"),
        (tmp_path, "is no regular file"),
        ("/dev/zero", "is no regular file"),
        ("a\0b", "no such file"),
        ("x" * 5000, "no such file|cannot be read: File name too long"),
        (tmp_path / "long.txt", "must be at most 1 MiB"),
        (tmp_path / "latin.txt", "must be UTF-8"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            read_files.read_text(files.Path(path))
        assert len(str(caught.value).splitlines()) == 1


@pytest.mark.timeout(60)
def test_what_cannot_be_written_is_told(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path, message in (
        ("/dev/full", "/dev/full: cannot be written: No space left on device"),
        (tmp_path / "pipe", "cannot be written: "),
        (tmp_path, "cannot be written: Is a directory"),
        (tmp_path / "none" / "x", "cannot be written: No such file"),
        ("a\0b", "cannot be written: .*embedded null"),
    ):
        with pytest.raises(InputError, match=message):
            files.write_text(files.Path(path), "text")
    files.write_text(tmp_path / "good", "é\ud800")
    assert (tmp_path / "good").read_text(encoding="utf-8") == "é\\ud800"
    with pytest.raises(InputError, match=r"--out a b: cannot be made: embedded null"):
        files.make_folder(files.Path("a\0b"), "--out ")


def test_unreadable_prompt_and_text_files_end_the_commands(fails, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    fails("pipe: is no regular file", "run", "testbed", "--prompt-file", "pipe")
    fails("/dev/zero: is no regular file", "calibrate", "sals25", "--model", "testbed", "--text", "/dev/zero")
    fails("'pipe': is no regular file", "show", "./pipe")
    (tmp_path / "run").mkdir()
    os.mkfifo(tmp_path / "run" / "cells.jsonl")
    fails("run/cells.jsonl: is no regular file", "evaluate", "--from", "run")
    fails("pipe/cells.jsonl: cannot be read: Not a directory", "evaluate", "--from", "pipe")


SHELL = r"""
p="$PYTHON -m kvpolicy"
said() { echo "== $1: $2: $(wc -l < err) $(head -c 300 err)"; }
$p schema > /dev/full 2> err; said "full device" $?
$p --help > /dev/full 2> err; said "help on a full device" $?
$p schema 2> err | true; said "closed pipe" ${PIPESTATUS[0]}
PYTHONIOENCODING=ascii $p list > table 2> err; said "ascii table" $?
PYTHONIOENCODING=ascii $p show odd.yaml --json > json 2> err; said "ascii json" $?
"""


@pytest.mark.timeout(600)  # five processes import torch, which is slow on a busy machine
def test_streams_that_cannot_take_what_is_written(tmp_path):
    """In processes of their own: what Python does with its streams at the very end is part of it."""
    (tmp_path / "odd.yaml").write_text('kvpolicy: 1\nname: "é…\U0001f600"\nbudget: 64\nscore: [recency]\n', "utf-8")
    environment = {**os.environ, "PYTHON": sys.executable, "NO_COLOR": "1"}
    ran = subprocess.run(  # noqa: S603
        ["bash", "-c", SHELL],  # noqa: S607
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    found = ran.stdout.splitlines()

    full = "2: 1 error: No space left on device"
    assert found == [
        f"== full device: {full}",
        f"== help on a full device: {full}",
        "== closed pipe: 141: 0 ",
        "== ascii table: 0: 0 ",
        "== ascii json: 0: 0 ",
    ], ran.stderr
    assert json.loads((tmp_path / "json").read_text("ascii"))["name"] == "é…\U0001f600"
    assert "streaming_llm" in (tmp_path / "table").read_text("ascii")
