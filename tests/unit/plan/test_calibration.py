"""Calibration files: what is written can be read, and nothing else is."""

import json
import os
import pathlib
import struct

import attrs
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import kvpolicy
from kvpolicy.errors import CalibrationError, ParameterError
from kvpolicy.plan.calibration import Calibration
from kvpolicy.plan.plan import compile_policy
from kvpolicy.spec.dump import calibrated_digest
from kvpolicy.stages import Codec, Geometry, Rotary, Site
from tests.support.models import model

ABOUT = {"kvpolicy": "2", "plugins": "s", "model": "m", "layers": "2"}


def written(path, tensors, about):
    save_file(tensors, path, metadata=about)
    return path


def test_what_is_written_is_read(tmp_path):
    layers = ({"basis": torch.rand(4, 2), "energy": torch.tensor(0.5)}, {"basis": torch.rand(4, 3)})
    path = tmp_path / "c.safetensors"
    Calibration(layers, "s", "m").save(path)
    found = Calibration.read(path)
    assert (found.plugins, found.model) == ("s", "m")
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
        {**ABOUT, "kvpolicy": "1"},
        {**ABOUT, "layers": "many"},
        {**ABOUT, "layers": "9999999"},
        {key: ABOUT[key] for key in ("kvpolicy", "plugins", "layers")},
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
    own = Calibration(({},), calibrated_digest(spec), "m")
    own.require(spec, "m")
    own.require(spec, None)
    with pytest.raises(CalibrationError, match=r"c\.st: was made for another model \(digest 'm', this one is 'n'\)"):
        own.require(spec, "n", "c.st")
    with pytest.raises(CalibrationError, match=r"other plugins than those of policy sals12 \(store: latent"):
        own.require(kvpolicy.load("sals12").spec, "m")


def test_the_budget_does_not_enter_the_digest_of_what_is_calibrated():
    small, large = kvpolicy.load("sals25", budget=64).spec, kvpolicy.load("sals25").spec
    assert calibrated_digest(small) == calibrated_digest(large)


@pytest.mark.parametrize(
    ("store", "change", "holds"),
    [
        ({"use": "rotation", "centre": "calibrated"}, {"bits": 3, "residual": 16, "norm_correction": True}, True),
        ({"use": "rotation", "centre": "calibrated"}, {"sinks": 8}, False),
        ({"use": "latent"}, {"value_bits": 2}, True),
        ({"use": "latent"}, {"rank": 0.5}, False),
    ],
)
def test_what_nothing_is_measured_by_may_change(store, change, holds):
    """`fit` tries a store with many residual lengths, and should not measure the model each time."""
    first, second = (calibrated_digest(kvpolicy.load("full", store=one).spec) for one in (store, {**store, **change}))
    assert (first == second) is holds


# -- contents -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    path = tmp_path_factory.mktemp("good") / "c.safetensors"
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0]
    layers = [{"basis": basis[:, :4].contiguous(), "energy": torch.tensor(0.5)} for _ in range(2)]
    Calibration(tuple(layers), "s", "m").save(path)
    return path


def test_every_byte_of_the_tensors_counts(good, tmp_path):
    raw = bytearray(good.read_bytes())
    start = 8 + struct.unpack("<Q", raw[:8])[0]
    path = tmp_path / "flipped"
    for place in range(start, len(raw)):
        raw[place] ^= 0x10
        path.write_bytes(raw)
        with pytest.raises(CalibrationError, match="flipped: is damaged, its contents do not have the digest in it"):
            Calibration.read(path)
        raw[place] ^= 0x10
    path.write_bytes(raw)
    Calibration.read(path)


CHANGES = {
    "another dtype": lambda tensor: tensor.to(torch.int32),
    "zeros": torch.zeros_like,
    "NaN": lambda tensor: tensor * float("nan"),
    "another shape": lambda tensor: tensor.T.contiguous(),
    "one bit of a number": lambda tensor: tensor + 1e-7,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_tensors_that_are_put_in_the_place_of_others(good, tmp_path, change):
    with safe_open(good, "pt") as file:
        about = file.metadata()
    tensors = load_file(good)
    tensors["layers.1.basis"] = change(tensors["layers.1.basis"])
    with pytest.raises(CalibrationError, match="is damaged"):
        Calibration.read(written(tmp_path / "w", tensors, about))


def test_tensors_of_layers_that_change_places_or_are_missing(good, tmp_path):
    with safe_open(good, "pt") as file:
        about = file.metadata()
    tensors = load_file(good)
    tensors["layers.1.basis"] = tensors["layers.1.basis"].flip(1).contiguous()
    changed = dict(tensors)
    changed["layers.0.basis"], changed["layers.1.basis"] = changed["layers.1.basis"], changed["layers.0.basis"]
    lost = {name: tensor for name, tensor in tensors.items() if name != "layers.0.energy"}
    for found in (changed, lost):
        with pytest.raises(CalibrationError, match="is damaged"):
            Calibration.read(written(tmp_path / "w", found, about))


@pytest.mark.parametrize("key", ["plugins", "model", "layers"])
def test_what_is_said_about_the_tensors_counts(good, tmp_path, key):
    with safe_open(good, "pt") as file:
        about = {**file.metadata(), key: "9"}
    with pytest.raises(CalibrationError, match="is damaged"):
        Calibration.read(written(tmp_path / "w", load_file(good), about))


def test_files_without_a_digest_are_made_anew(tmp_path):
    path = written(tmp_path / "old", {"layers.0.basis": torch.rand(2, 2)}, ABOUT)
    with pytest.raises(CalibrationError, match=r"old: has no digest of its contents.*: calibrate again"):
        Calibration.read(path)


def test_tensors_of_every_kind_are_written_and_read(tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    layers = (
        {
            "same": whole,
            "turned": whole.T,
            "empty": torch.empty(0, 3),
            "one": torch.tensor(7),
            "yes": torch.tensor([True]),
        },
        {"same": whole, "bits": torch.ones(3, dtype=torch.bfloat16), "wide": torch.ones(2).expand(3, 2)},
    )
    Calibration(layers, "s", "m").save(tmp_path / "c")
    for found, expected in zip(Calibration.read(tmp_path / "c").layers, layers, strict=True):
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_what_was_read_does_not_change_with_the_file(good, tmp_path):
    path = tmp_path / "c"
    path.write_bytes(good.read_bytes())
    found = Calibration.read(path)
    with path.open("r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(b"\xff" * 64)
    assert all(bool(tensor.isfinite().all()) for one in found.layers for tensor in one.values())


# -- files that are none --------------------------------------------------------------------------------------------


def test_pipes_and_devices_are_no_files(tmp_path):
    """Nobody writes to the pipe: opening it as usual would wait for ever."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", pathlib.Path("/dev/zero"), pathlib.Path("/dev/null"), pathlib.Path("/dev/tty")):
        with pytest.raises(CalibrationError, match="cannot be read as safetensors"):
            Calibration.read(path)


NO_PATHS = {"NUL": "a\0b", "NUL in bytes": b"a\0b", "long": "x" * 5000, "number": 7, "none": None, "object": object()}


@pytest.mark.parametrize("path", NO_PATHS.values(), ids=NO_PATHS)
def test_paths_that_are_none(path):
    with pytest.raises(CalibrationError, match="cannot be read"):
        Calibration.read(path)
    with pytest.raises(CalibrationError, match="cannot be written"):
        Calibration(({},), "s", "m").save(path)


@pytest.mark.parametrize("path", [7, object()], ids=["number", "object"])
def test_a_policy_is_given_no_path(path):
    with pytest.raises(CalibrationError, match="cannot be read"):
        kvpolicy.load("sals25").check(model().config, calibration=path)


def entries(count):
    return {f"layers.{number}.basis": {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for number in range(count)}


BROKEN = {
    "too many tensors": json.dumps({"__metadata__": ABOUT, **entries(5000)}).encode(),
    "no mapping": b"[1]",
    "very deep": b"[" * 100_000,
    "no text": b"\xff\xfe{}",
    "a tensor that is none": b'{"layers.0.basis": 7}',
    "an unknown dtype": json.dumps({"layers.0.basis": {"dtype": "F3", "shape": [0], "data_offsets": [0, 0]}}).encode(),
    "a long number": b'{"layers.0.basis": ' + b"9" * 10_000 + b"}",
}


@pytest.mark.parametrize("header", BROKEN.values(), ids=BROKEN)
def test_headers_that_no_calibration_has(tmp_path, header):
    path = tmp_path / "w"
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CalibrationError, match=r"w: cannot be read as safetensors: .{0,200}$"):
        Calibration.read(path)


def test_a_header_is_not_parsed_before_its_size_is_known(tmp_path, monkeypatch):
    """200,000 tensors took half a minute; a sparse file can announce as many as it likes."""
    path = tmp_path / "w"
    path.write_bytes(struct.pack("<Q", 2**30))
    os.truncate(path, 2**30 + 100)
    monkeypatch.setattr(json, "loads", None)
    with pytest.raises(CalibrationError, match=f"header has {2**30} bytes, those of calibrations have at most"):
        Calibration.read(path)


def test_messages_are_short(tmp_path):
    path = written(tmp_path / "w", {"x" * 100_000: torch.rand(1)}, {**ABOUT, "plugins": "y" * 100_000})
    with pytest.raises(CalibrationError, match=r"^.{0,400}$"):
        Calibration.read(path)
    path = written(tmp_path / "w", {"layers.0.b": torch.rand(1)}, {"kvpolicy": "y" * 100_000})
    with pytest.raises(CalibrationError, match=r"^.{0,400}$"):
        Calibration.read(path)


# -- what the store says ---------------------------------------------------------------------------------------------

GEOMETRY = Geometry((0, 1), 4, 2, 8)


def compiled(policy, layers):
    spec = kvpolicy.load(
        policy,
        **({"store": {"use": "latent", "rank": 0.25, "value_group": 8, "batch": 2}} if policy == "sals25" else {}),
    ).spec
    rotary = Rotary(100.0 ** -(torch.arange(0, 8, 2) / 8))
    named = tuple({f"store.{name}": tensor for name, tensor in layer.items()} for layer in layers)
    calibration = Calibration(named, calibrated_digest(spec), "m")
    return compile_policy(spec, GEOMETRY, "cpu", torch.float32, rotary, calibration)


def turned(change):
    basis = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0)))[0][:, :4]
    return {"basis": change(basis.clone()), "energy": torch.tensor(0.5)}


def one_number(basis):
    basis[3, 2] += 0.01
    return basis


BASES = {
    "whole numbers": (lambda basis: basis.to(torch.int32), r"'basis' must be floating point: torch\.int32"),
    "zeros": (torch.zeros_like, "basis must have orthonormal columns: they are off by 1"),
    "NaN": (lambda basis: basis * float("nan"), "'basis' must be finite"),
    "infinity": (lambda basis: basis.fill_(float("inf")), "'basis' must be finite"),
    "a column of zeros": (lambda basis: basis.index_fill_(1, torch.tensor([1]), 0), "orthonormal"),
    "the same column twice": (lambda basis: basis[:, [0, 1, 2, 2]], "orthonormal"),
    "another length": (lambda basis: basis * 1.01, "orthonormal"),
    "one number": (one_number, "orthonormal"),
    "another model": (lambda basis: basis[:8], r"a basis of shape \[16, 4\] or wider for this model: \[8, 4\]"),
    "a vector": (lambda basis: basis[:, 0], "a basis of shape"),
    "none": (lambda basis: basis.new_empty(0), "a basis of shape"),
}


@pytest.mark.parametrize(("change", "message"), BASES.values(), ids=BASES)
def test_a_basis_is_one(change, message):
    """Wherever a calibration comes from; the layer is named."""
    compiled("sals25", (turned(torch.Tensor.clone),) * 2)
    with pytest.raises(
        CalibrationError, match=f"^the calibration of layer 1 is not one of latent for this model: .*{message}"
    ):
        compiled("sals25", (turned(torch.Tensor.clone), turned(change)))


def test_a_wide_basis_in_float32_is_orthonormal_enough():
    basis = torch.linalg.qr(torch.randn(1024, 1024, dtype=torch.float64))[0].float()
    spec = kvpolicy.load("sals12").spec
    geometry, rotary = Geometry((0,), 8, 8, 128), Rotary(100.0 ** -(torch.arange(0, 128, 2) / 128))
    spec.store.check_calibration(Site(geometry, torch.bfloat16, 0, rotary, {"basis": basis}))


BITS = {
    "not whole": torch.tensor(4.0),
    "NaN": torch.tensor(float("nan")),
    "several": torch.tensor([4, 4]),
    "none": torch.empty(0, dtype=torch.int64),
    "too many": torch.tensor(5),
    "huge": torch.tensor(2**62),
}


@pytest.mark.parametrize("bits", BITS.values(), ids=BITS)
def test_bits_are_a_number_of_bits(bits):
    compiled("tada", ({"bits": torch.tensor(2)}, {"bits": torch.tensor(8)}))
    with pytest.raises(
        CalibrationError, match="the calibration of layer 0 is not one of tada for this model: bits: must be"
    ):
        compiled("tada", ({"bits": bits}, {"bits": torch.tensor(8)}))


@attrs.frozen
class Plain(Codec):
    """A third party's, that says nothing about what it has measured."""

    name = "plainly"

    def formats(self, site):
        raise NotImplementedError

    @property
    def calibrated(self):
        return True


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(3, dtype=torch.uint8), "'scale' must be floating point: torch.uint8"),
        (torch.tensor([1.0, float("nan")]), "'scale' must be finite"),
        (torch.tensor(float("-inf")), "'scale' must be finite"),
    ],
)
def test_other_codecs_are_protected_from_numbers_that_are_none(tensor, message):
    Plain().check_calibration(Site(GEOMETRY, torch.float32, 0, None, {"scale": torch.ones(3), "bias": torch.empty(0)}))
    with pytest.raises(ParameterError, match=message):
        Plain().check_calibration(Site(GEOMETRY, torch.float32, 0, None, {"scale": tensor}))
