"""Calibration files: what is written can be read, and nothing else is."""

import json
import struct

import pytest
import torch
from safetensors.torch import save_file

import kvpolicy
from kvpolicy.errors import CalibrationError
from kvpolicy.plan.calibration import Calibration
from kvpolicy.spec.dump import plugin_digest

ABOUT = {"kvpolicy": "1", "store": "s", "model": "m", "layers": "2"}


def written(path, tensors, about):
    save_file(tensors, path, metadata=about)
    return path


def test_what_is_written_is_read(tmp_path):
    layers = ({"basis": torch.rand(4, 2), "energy": torch.tensor(0.5)}, {"basis": torch.rand(4, 3)})
    path = tmp_path / "c.safetensors"
    Calibration(layers, "s", "m").save(path)
    found = Calibration.read(path)
    assert (found.store, found.model) == ("s", "m")
    for left, right in zip(found.layers, layers, strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[name], right[name]) for name in left)


def test_layers_without_tensors_are_counted(tmp_path):
    Calibration(({}, {"bits": torch.tensor(4)}, {}), "s", "m").save(tmp_path / "c")
    assert [list(one) for one in Calibration.read(tmp_path / "c").layers] == [[], ["bits"], []]


def test_no_file(tmp_path):
    with pytest.raises(CalibrationError, match=r"none\.safetensors: cannot be read"):
        Calibration.read(tmp_path / "none.safetensors")
    with pytest.raises(CalibrationError, match="cannot be read"):
        Calibration.read(tmp_path)
    with pytest.raises(CalibrationError, match="cannot be written"):
        Calibration(({},), "s", "m").save(tmp_path / "no" / "folder")


OUTSIDE = json.dumps({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
HEADERS = {
    "nothing": b"",
    "no header": b"\x00" * 7,
    "a length beyond the file": struct.pack("<Q", 10**12) + b"{}",
    "no JSON": struct.pack("<Q", 4) + b"abcd",
    "offsets beyond the file": struct.pack("<Q", len(OUTSIDE)) + OUTSIDE,
    "a pickle": b"\x80\x04\x95\x0c\x00\x00\x00\x00\x00\x00\x00\x8c\x08builtins",
}


@pytest.mark.parametrize("content", HEADERS.values(), ids=HEADERS)
def test_a_damaged_file(tmp_path, content):
    path = tmp_path / "damaged.safetensors"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"damaged\.safetensors: cannot be read as safetensors"):
        Calibration.read(path)


def test_a_truncated_file(tmp_path):
    path = tmp_path / "c.safetensors"
    Calibration(({"basis": torch.rand(64, 64)},), "s", "m").save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CalibrationError, match="cannot be read as safetensors"):
        Calibration.read(path)


@pytest.mark.parametrize(
    "about",
    [
        {},
        {**ABOUT, "kvpolicy": "2"},
        {**ABOUT, "layers": "many"},
        {**ABOUT, "layers": "9999999"},
        {key: ABOUT[key] for key in ("kvpolicy", "store", "layers")},
    ],
)
def test_safetensors_of_another_kind(tmp_path, about):
    path = written(tmp_path / "w", {"layers.0.basis": torch.rand(2, 2)}, about)
    with pytest.raises(CalibrationError, match="is not a calibration of kvpolicy"):
        Calibration.read(path)


@pytest.mark.parametrize("name", ["basis", "layers.basis", "layers.2.basis", "layers.x.basis", "weights.0.basis"])
def test_a_tensor_that_does_not_belong_there(tmp_path, name):
    path = written(tmp_path / "w", {name: torch.rand(2, 2)}, ABOUT)
    with pytest.raises(CalibrationError, match=f"does not belong there: '{name}'"):
        Calibration.read(path)


def test_it_says_for_what_it_was_made():
    spec = kvpolicy.load("sals25").spec
    own = Calibration(({},), plugin_digest(spec.store), "m")
    own.require(spec, "m")
    own.require(spec, None)
    with pytest.raises(CalibrationError, match=r"c\.st: was made for another model \(digest m, this one is n\)"):
        own.require(spec, "n", "c.st")
    with pytest.raises(CalibrationError, match=r"another store than that of policy sals12 \(latent"):
        own.require(kvpolicy.load("sals12").spec, "m")


def test_the_budget_does_not_enter_the_digest_of_a_store():
    small, large = kvpolicy.load("sals25", budget=64).spec, kvpolicy.load("sals25").spec
    assert plugin_digest(small.store) == plugin_digest(large.store)
