"""Codecs: what comes out is what went in, up to the error that the codec admits."""

import torch
from torch import Tensor

from kvpolicy.stages.checks import check_tensor, contract_error
from kvpolicy.stages.conformance.promises import Promises
from kvpolicy.stages.conformance.samples import expect_untouched, sample_view
from kvpolicy.stages.contracts import Codec


def encodes_to_its_columns(codec: Codec, _promises: Promises) -> None:
    view = sample_view()
    for dtype in (torch.float32, torch.bfloat16):
        columns = codec.columns(view.geometry, dtype)
        encoded = codec.encode(view.keys.to(dtype), view.values.to(dtype))
        if encoded.keys() != columns.keys():
            raise contract_error(codec, f"encoded to {sorted(encoded)}, expected {sorted(columns)}")
        for name, column in columns.items():
            row = zip(("batch", "kv_heads", "seq"), view.positions.shape, strict=True)
            inner = {f"{name}[{i}]": size for i, size in enumerate(column.shape)}
            check_tensor(codec, encoded[name], {**dict(row), **inner}, column.dtype, view.keys.device)


def decodes_what_it_encoded(codec: Codec, promises: Promises) -> None:
    view = sample_view()
    for dtype in (torch.float32, torch.bfloat16):
        sources = view.keys.to(dtype), view.values.to(dtype)
        decoded = codec.decode(codec.encode(*sources))
        for name, found, source in zip(("keys", "values"), decoded, sources, strict=True):
            _expect_within(codec, name, found, source, promises.error)


def leaves_its_input_alone(codec: Codec, _promises: Promises) -> None:
    view = sample_view()
    inputs = {"keys": view.keys, "values": view.values}
    before = {name: tensor.clone() for name, tensor in inputs.items()}
    codec.decode(codec.encode(view.keys, view.values))
    expect_untouched(codec, before, inputs)


def _expect_within(codec: Codec, name: str, found: Tensor, source: Tensor, error: float) -> None:
    sizes = {f"size {i}": size for i, size in enumerate(source.shape)}
    check_tensor(codec, found, sizes, source.dtype, source.device)
    worst = float((found.float() - source.float()).abs().max())
    allowed = error * float(source.abs().max())
    if not worst <= allowed:
        raise contract_error(codec, f"decoded {name} with an error of {worst:g}, expected at most {allowed:g}")


CHECKS = (encodes_to_its_columns, decodes_what_it_encoded, leaves_its_input_alone)
