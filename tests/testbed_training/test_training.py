"""A few steps of training on tiny rows: the loss falls, a run goes on where it was, and what is published loads."""

import json

import pytest
import torch
from typer.testing import CliRunner

from kvpolicy.evaluate.testbed import EVALUATED
from kvpolicy.evaluate.testbed.load import read_folder
from kvpolicy.evaluate.testbed.training_text import training_text
from tests.testbed_training.__main__ import app
from tests.testbed_training.batches import make_batch
from tests.testbed_training.settings import Settings
from tests.testbed_training.train import optimize, start

CPU = torch.device("cpu")
MIXTURE = ("copying", *EVALUATED)


@pytest.fixture(scope="module")
def trained():
    """A run after four steps on one batch, and the loss of each."""
    run, losses = start(Settings(), CPU), []
    batch = make_batch(0, 0, MIXTURE, 128)
    for _ in range(4):
        losses.append(float(optimize(run, batch, 1e-3, 1.0)[0]))
        run.step += 1
        run.tokens += batch.tokens.numel()
    point = {"tokens": run.tokens, "loss": losses[-1], "accuracy": {"recall": 0.1}, "length": 128}
    run.points = [point, {**point, "tokens": 2 * run.tokens, "length": 256}]
    return run, losses


def test_calibration_text_is_the_text_of_training():
    assert torch.equal(training_text(7, EVALUATED, 200), make_batch(7, 0, EVALUATED, 200).tokens)


def test_the_loss_falls(trained):
    assert trained[1][-1] < trained[1][0]


def test_a_run_goes_on_where_it_was(trained, tmp_path):
    run, _ = trained
    run.save(tmp_path)
    other = start(Settings(seed=Settings().seed + 1), CPU)
    other.restore(tmp_path)

    assert (other.step, other.tokens, other.points) == (run.step, run.tokens, run.points)
    pairs = zip(run.model.state_dict().values(), other.model.state_dict().values(), strict=True)
    assert all(torch.equal(left, right) for left, right in pairs)


def test_what_is_published_loads_and_tells_its_accuracy(trained, tmp_path):
    run, _ = trained
    run.save(tmp_path / "run")
    words = ("publish", "--run", tmp_path / "run", "--out", tmp_path / "weights", "--items", 1, "--lengths", 128)
    words = (*words, "--threads", torch.get_num_threads())
    result = CliRunner().invoke(app, list(map(str, words)), catch_exceptions=False)
    record = json.loads((tmp_path / "weights" / "training.json").read_text())
    model, tokenizer = read_folder(tmp_path / "weights", torch.float32)

    assert result.exit_code == 0
    assert [row["task"] for row in record["accuracy"]] == list(EVALUATED)
    assert record["spent"]["step"] == 4
    assert model.config.vocab_size == len(tokenizer)
    assert (tmp_path / "weights" / "training.png").read_bytes().startswith(b"\x89PNG")
