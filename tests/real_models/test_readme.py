"""The commands of the README on a real model work as they stand; tests/docs runs the others."""

import re
import shlex

import pytest
from typer.testing import CliRunner

from kvpolicy.cli.app import app
from tests.support.building import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^kvpolicy .*smollm2.*$", README, flags=re.MULTILINE)
TYPED = "What is the capital of France?\nAnd what is the capital of Italy?\n/report\n"


def test_there_are_such_commands():
    assert [shlex.split(command)[1] for command in COMMANDS] == ["run", "chat", "calibrate", "run"]


@pytest.mark.usefixtures("smollm2")
def test_readme_commands_answer(tmp_path, monkeypatch):
    """In order, in one folder: the third writes what the fourth reads."""
    monkeypatch.chdir(tmp_path)
    for command in COMMANDS:
        done = CliRunner().invoke(app, shlex.split(command)[1:], input=TYPED, prog_name="kvpolicy")
        assert done.exit_code == 0, done.stderr
        _, verb, *words = shlex.split(command)
        if verb != "calibrate":
            assert "Paris" in done.stdout
            assert ("Rome" in done.stdout) == (verb == "chat")
            assert f"policy {words[words.index('--policy') + 1]}: " in done.stderr
            assert "│   0-29 │" in done.stderr
