"""Stores are calibrated once each, and on the tokens that were given."""

import copy

import attrs
import pytest
import torch

import kvpolicy
from kvpolicy.errors import CalibrationError
from kvpolicy.evaluate.harness.calibrations import Calibrations
from kvpolicy.plan.calibration import Calibration

TOKENS = torch.arange(8, 8 + 3 * 64).reshape(3, 64)


@pytest.fixture
def made(tiny):
    """With the calls for tokens that it has made."""
    calls = []
    return Calibrations(tiny[0], lambda: calls.append(1) or TOKENS), calls


@pytest.fixture(scope="module")
def sals():
    return kvpolicy.load("sals25", store={"use": "latent", "rank": 0.25, "value_group": 8, "batch": 2})


def test_each_store_is_calibrated_once(made, sals):
    """Whatever else differs; and tokens are made when the first store asks for them."""
    calibrations, calls = made
    assert calibrations.of(kvpolicy.load("snapkv")) is None
    assert calls == []
    first = calibrations.of(sals)
    other = attrs.evolve(sals, spec=attrs.evolve(sals.spec, name="other"), origin="elsewhere")

    assert calibrations.of(other) is first
    assert calls == [1]


def test_another_store_has_a_calibration_of_its_own(made, sals):
    """Both fit the policies that they were made for, and on the same tokens."""
    calibrations, calls = made
    half = kvpolicy.load("sals25", store={"use": "latent", "rank": 0.5, "value_group": 8, "batch": 2})
    first, second = calibrations.of(sals), calibrations.of(half)

    assert calls == [1]
    sals.compile(calibrations.model, calibration=first)
    half.compile(calibrations.model, calibration=second)
    with pytest.raises(CalibrationError, match="other plugins"):
        half.compile(calibrations.model, calibration=first)


def test_it_is_what_the_policy_measures_itself(made, sals):
    own = sals.calibrate(made[0].model, TOKENS)
    found = made[0].of(sals)

    for ours, theirs in zip(found.layers, own.layers, strict=True):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_model_in_16_bits_is_calibrated_in_float32_where_that_is_asked_for(tiny, sals):
    """The model stays as it is, and what was measured goes with it: its digest is that of the model in 16 bits."""
    model = copy.deepcopy(tiny[0]).to(torch.bfloat16)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    found = Calibrations(model, lambda: TOKENS, in_float32=True).of(sals)
    wider = sals.calibrate(copy.deepcopy(model).to(torch.float32), TOKENS)

    sals.compile(model, calibration=found)
    for ours, theirs in zip(found.layers, wider.layers, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())

    own = Calibrations(model, lambda: TOKENS).of(sals)
    assert not all(
        torch.equal(ours[name], theirs[name])
        for ours, theirs in zip(found.layers, own.layers, strict=True)
        for name in ours
    )


def test_what_is_kept_in_a_folder_is_not_made_again(made, sals, tmp_path):
    """By whom ever: another process finds the tensors, and tokens and float32 tell calibrations apart."""
    folder = tmp_path / "none yet"
    first = Calibrations(made[0].model, lambda: TOKENS, folder=folder).of(sals)
    unmeasured = Calibrations(made[0].model, lambda: TOKENS, folder=folder)
    unmeasured._measured = None
    found = unmeasured.of(sals)

    assert found.digest == first.digest
    assert len(list(folder.iterdir())) == 1
    sals.compile(made[0].model, calibration=found)
    assert Calibrations(made[0].model, lambda: TOKENS + 1, folder=folder).of(sals).digest != first.digest
    Calibrations(made[0].model, lambda: TOKENS, in_float32=True, folder=folder).of(sals)
    assert len(list(folder.iterdir())) == 3


@pytest.mark.parametrize("fault", ["damaged", "of another model", "a folder"])
def test_what_a_folder_should_not_hold_is_made_anew(fault, made, sals, tiny, tmp_path):
    model = made[0].model
    right = Calibrations(model, lambda: TOKENS, folder=tmp_path).of(sals)
    (file,) = tmp_path.iterdir()
    if fault == "damaged":
        file.write_bytes(file.read_bytes()[:-1] + b"!")
    elif fault == "of another model":
        other = copy.deepcopy(model)
        with torch.no_grad():
            next(other.parameters()).mul_(2)
        sals.calibrate(other, TOKENS).save(file)
    else:
        file.unlink()
        file.mkdir()

    assert Calibrations(model, lambda: TOKENS, folder=tmp_path).of(sals).digest == right.digest
    if fault != "a folder":  # that stays, and what cannot be written is used all the same
        assert Calibration.read(file).digest == right.digest
