"""The environment of the peers is made step by step, and is there when all that it must have is."""

import pytest
import torch

from kvpolicy.errors import InputError
from kvpolicy.peers import environment, install, python_of, required_python

RELEASE = torch.__version__.partition("+")[0]


class Steps(list):
    """Commands without `python -m`; installing a requirement of `failing` fails."""

    failing = ()


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """The steps that were run."""
    steps = Steps()

    def run(command):
        steps.append(command[2:])
        if "venv" in command:
            (tmp_path / "kvpress").mkdir()
        assert python_of(tmp_path) is None  # not before the last step is done
        if steps[-1][3:4] and steps[-1][3] in steps.failing:
            raise InputError("no such wheel")

    monkeypatch.setattr(environment, "_run", run)
    return steps


def test_environment_has_torch_first_and_is_ready_in_the_end(tmp_path, ran):
    said = []
    python = install(said.append, tmp_path)
    wanted = [f"torch=={RELEASE}", *environment.REQUIREMENTS, *environment.OPTIONAL]

    assert ran[0] == ["venv", "--clear", str(tmp_path / "kvpress")]
    assert [command[3] for command in ran[1:]] == wanted
    assert all(f"torch=={RELEASE}" in command for command in ran[1:])
    assert python_of(tmp_path) == python == tmp_path / "kvpress" / "bin" / "python"
    assert (tmp_path / "kvpress" / "ready").read_text().split() == wanted
    assert len(said) == 1 + len(wanted)


def test_what_is_optional_is_said_and_left_out(tmp_path, ran):
    ran.failing = (environment.OPTIONAL[0],)
    said = []

    assert install(said.append, tmp_path) == python_of(tmp_path)
    assert said[-2] == f"left out: {environment.OPTIONAL[0]}: no such wheel"
    assert environment.OPTIONAL[0] not in ran[-1]
    assert (tmp_path / "kvpress" / "ready").read_text().split()[-1] == environment.OPTIONAL[1]


def test_what_is_not_optional_is_an_error(tmp_path, ran):
    ran.failing = (environment.REQUIREMENTS[1],)

    with pytest.raises(InputError, match="no such wheel"):
        install(lambda _text: None, tmp_path)
    assert python_of(tmp_path) is None


def test_a_step_that_fails_leaves_no_environment(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(InputError, match="venv --clear failed: "):
        install(lambda _text: None, tmp_path / "file" / "below")
    assert python_of(tmp_path / "file" / "below") is None


def test_peers_live_where_the_variables_say(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.delenv("KVPOLICY_PEERS", raising=False)
    assert environment.home() == tmp_path / "kvpolicy" / "peers"
    monkeypatch.setenv("KVPOLICY_PEERS", str(tmp_path / "mine"))
    assert environment.home() == tmp_path / "mine"


def test_an_option_that_needs_them_says_how_to_install_them(monkeypatch, tmp_path):
    monkeypatch.setenv("KVPOLICY_PEERS", str(tmp_path))
    with pytest.raises(InputError, match=r"^--peer: kvpress is not installed: kvpolicy bench peers install$"):
        required_python("--peer")
