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
    assert [shlex.split(command)[1] for command in COMMANDS] == ["run", "chat"]


@pytest.mark.usefixtures("smollm2")
@pytest.mark.parametrize("command", COMMANDS)
def test_readme_command_answers(command):
    done = CliRunner().invoke(app, shlex.split(command)[1:], input=TYPED, prog_name="kvpolicy")

    assert done.exit_code == 0, done.stderr
    assert "Paris" in done.stdout
    assert ("Rome" in done.stdout) == (" chat " in command)
    assert "policy snapkv: " in done.stderr
    assert "│   0-29 │" in done.stderr
