"""The command line in this process: what it prints where, and its exit code."""

import shutil

import pytest
from transformers import AutoTokenizer, GenerationConfig
from typer.testing import CliRunner

from kvpolicy.cli.app import app
from kvpolicy.stages.registry.plugins import registry
from tests.support.untrained_testbed import untrained_testbed
from tests.testbed_training.tokenizer import build_tokenizer

TEMPLATE = """
{%- for message in messages %}
{%- if message['role'] == 'system' %}
{%- if message['content'] == 'secret' %}{{ raise_exception('no secret system messages') }}{% endif %}
{{- 'note ' + message['content'] + ' . ' }}
{%- elif message['role'] == 'user' %}{{ 'ask ' + message['content'] + ' . ' }}
{%- else %}{{ message['content'] + ' <eos> ' }}{% endif %}
{%- endfor %}"""


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


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """An untrained model with a tokenizer, as a folder."""
    path = tmp_path_factory.mktemp("model")
    model = untrained_testbed(max_position_embeddings=256)
    model.generation_config = GenerationConfig(eos_token_id=None, pad_token_id=0)
    model.save_pretrained(path)
    build_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def chat_folder(folder, tmp_path_factory):
    """The same model, with a chat template of words that its tokenizer knows."""
    return with_template(folder, tmp_path_factory.mktemp("chat") / "model", TEMPLATE)


def with_template(folder, path, template):
    """A copy of a model's folder with a chat template."""
    shutil.copytree(folder, path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = template
    tokenizer.save_pretrained(path)
    return path


@pytest.fixture
def templated(folder, tmp_path):
    """Makes a folder with a model that has the chat template given."""
    return lambda template: with_template(folder, tmp_path / "templated", template)
