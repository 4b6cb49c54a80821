"""Calibrations from tables of numbers of heads: which rows and columns of these are whose."""

import pytest
import torch

import kvpolicy
from kvpolicy.errors import CalibrationError
from tests.support.models import build


def shown(policy, model, path):
    layers = policy.calibrate_from_table(model, path).layers
    return torch.stack([layer["allocate.joint.importance"] for layer in layers])


def test_layers_that_no_policy_manages_have_rows_that_nobody_reads(tmp_path):
    """The first of three layers has a sliding window."""
    model, path = build("gemma3"), tmp_path / "heads.tsv"
    path.write_text("9 9 9 9\n1 2 3 4\n0 0 0 0.5\n")
    expected = torch.tensor([[1, 2, 3, 4], [0, 0, 0, 0.5]]) / 4  # the largest that is read
    assert torch.equal(shown(kvpolicy.load("headkv"), model, path), expected)
    path.write_text("1 0\n0 1\n0.25 0.5\n")
    expected = torch.tensor([[0, 0, 1, 1], [0.25, 0.25, 0.5, 0.5]])
    assert torch.equal(shown(kvpolicy.load("duoattention"), model, path), expected)

    path.write_text("1 2 3 4\n0 0 0 0.5\n")
    with pytest.raises(CalibrationError, match="must have 3 layers of 4 query heads, as the model: it has 2 of 4"):
        kvpolicy.load("headkv").calibrate_from_table(model, path)
