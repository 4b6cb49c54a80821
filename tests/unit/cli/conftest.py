"""The command line in this process: what it prints where, and its exit code."""

import pytest
from typer.testing import CliRunner

from kvpolicy.cli.app import app
from kvpolicy.stages.registry.plugins import registry


@pytest.fixture
def kv(monkeypatch, tmp_path):
    """Runs a command, `kv("list")`, in an empty folder; wide enough that tables are not folded, and offline."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    registry.cache_clear()

    def call(*words, **options):
        return CliRunner().invoke(app, [str(word) for word in words], prog_name="kvpolicy", **options)

    yield call
    registry.cache_clear()


@pytest.fixture
def fails(kv):
    """Runs a command that must fail: exit code 2, nothing on stdout, and the message alone on stderr."""

    def call(message, *words, **options):
        result = kv(*words, **options)

        assert result.stdout == ""
        assert result.stderr == f"error: {message}\n"
        assert result.exit_code == 2

    return call


@pytest.fixture
def good(tmp_path):
    """A policy file without problems."""
    file = tmp_path / "good.yaml"
    file.write_text("kvpolicy: 1\nbudget: 64\nscore:\n  - {use: recency}\n")
    return file


@pytest.fixture
def bad(tmp_path):
    """A policy file with two problems."""
    file = tmp_path / "bad.yaml"
    file.write_text("kvpolicy: 1\nbudget: 0\nscore:\n  - {use: recencyy}\n")
    return file
