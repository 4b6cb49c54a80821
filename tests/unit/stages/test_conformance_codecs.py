"""The conformance suite finds what is wrong with a codec."""

import attrs
import pytest
import torch

from kvpolicy.errors import ParameterError, PluginContractError
from kvpolicy.stages import (
    AsIs,
    Codec,
    Column,
    Format,
    Formats,
)
from kvpolicy.stages.conformance import Promises, check_plugin, conformance_cases


@attrs.frozen(eq=False)
class Rounded(Format):
    """Numbers to one decimal place, in groups of two entries."""

    columns: dict
    dtype: torch.dtype
    group_size: int = 2
    step: int = 4

    def encode(self, vectors, positions):
        return {"rounded": vectors.unflatten(2, (vectors.shape[2] // 2, 2)).float().round(decimals=1)}

    def decode(self, columns, positions):
        return columns["rounded"].flatten(2, 3).to(self.dtype)


class Halved(Rounded):
    """Reads half of each number."""

    def decode(self, columns, positions):
        return super().decode(columns, positions) / 2


@attrs.frozen
class Rounding(Codec):
    name = "rounding"

    def formats(self, site):
        columns = {"rounded": Column((2, site.geometry.head_dim), torch.float32)}
        return Formats(self.kind()(columns, site.dtype), AsIs())

    def kind(self):
        return Rounded


def broken_codec(*own, **members):
    """`Rounding` with methods of its `own`, whose formats have other members."""
    body = {"name": "rounding", "kind": lambda self: type("Broken", (Rounded,), members), "__module__": __name__}
    body.update((method.__name__, method) for method in own)
    return attrs.frozen(type("BrokenCodec", (Rounding,), body))()


def encoding(change):
    """A codec that changes what `Rounded` encodes."""

    def encode(self, vectors, positions):
        return {"rounded": change(Rounded.encode(self, vectors, positions)["rounded"])}

    return broken_codec(encode=encode)


def decoding(change):
    """A codec that changes what `Rounded` decodes, from [B, K, n, D] and positions."""

    def decode(self, columns, positions):
        return change(Rounded.decode(self, columns, positions), positions)

    return broken_codec(decode=decode)


def doubled_in_place(self, vectors, positions):
    return Rounded.encode(self, vectors.mul_(2), positions)


def zeroed_in_place(self, columns, positions):
    return Rounded.decode(self, {"rounded": columns["rounded"].zero_()}, positions)


def giving(change):
    """A codec that gives a different result than `Rounding` does."""

    def formats(self, site):
        return change(Rounding.formats(self, site))

    return broken_codec(formats)


def calibrate(self, samples):
    return []


def refusing(error):
    """A codec that supports only a head dimension of 64."""

    def formats(self, site):
        if site.geometry.head_dim != 64:
            raise error
        return Rounding.formats(self, site)

    return broken_codec(formats)


def spread(rounded):
    return rounded - rounded.mean(2, keepdim=True)


CODECS = {
    "gave AsIs, expected Formats": giving(lambda formats: formats.values),
    "gave a joint format, expected `joint` to be True": broken_codec(joint=True),
    "refuses a model in words: plugin 'rounding': codec 'rounding' raised ValueError: no": refusing(ValueError("no")),
    "packed 1 of 1 entries after 0, expected whole groups of 2, never fewer than before": broken_codec(
        packed_length=lambda self, n: n
    ),
    "packed 4 of 0 entries after 0, expected": broken_codec(packed_length=lambda self, n: 4),
    "packed 0 of 9 entries after 8, expected": broken_codec(packed_length=lambda self, n: 8 if n == 8 else 0),
    "packed 3 of 3 entries after 0, expected": giving(lambda both: Formats(attrs.evolve(both.keys, step=3), AsIs())),
    "encoded to [], expected ['rounded']": broken_codec(encode=lambda self, vectors, positions: {}),
    "returned torch.float64, expected torch.float32": encoding(torch.Tensor.double),
    "(batch=3, kv_heads=2, groups=3, rounded[0]=2, rounded[1]=64)": encoding(lambda rounded: rounded[..., 1:]),
    "decoded with an error of 0.0499801, expected at most 0": Rounding(),
    "returned torch.float16, expected torch.float32": decoding(lambda vectors, _: vectors.half()),
    "not finite for zeros": decoding(lambda vectors, _: vectors / vectors.abs().amax(-1, keepdim=True)),
    "for group 0 alone": encoding(spread),
    "when group 0 is decoded alone": decoding(lambda vectors, _: vectors.flip(2)),
    "for row 0 alone": encoding(lambda rounded: rounded - rounded.mean(0)),
    "when heads are read behind each other": broken_codec(
        of_entries=lambda self, heads, counts: Halved(self.columns, self.dtype)
    ),
    "for head 0 beside another one": encoding(lambda rounded: rounded - rounded.mean(1, keepdim=True)),
    "when the contents of empty slots differ": decoding(
        lambda vectors, at: vectors + (vectors * (at < 0)[..., None]).amax()
    ),
    "not finite for empty slots": decoding(lambda vectors, at: vectors / (at >= 0)[..., None]),
    "changed its input 'vectors'": broken_codec(encode=doubled_in_place),
    "changed its input 'rounded'": broken_codec(decode=zeroed_in_place),
    "the second time": encoding(lambda rounded: rounded + torch.rand(())),
    "calibrated 0 layers, expected 3": broken_codec(calibrate),
}


@pytest.mark.parametrize(("message", "codec"), CODECS.items(), ids=CODECS)
def test_a_broken_codec_is_found_out(message, codec):
    with pytest.raises(PluginContractError) as caught:
        check_plugin(codec)
    assert message in str(caught.value)


def test_an_admitted_error_is_no_fault():
    check_plugin(Rounding(), Promises(error=0.05))


def test_a_refusal_in_words_is_no_fault():
    refused = refusing(ParameterError("group: must divide the head dimension"))
    for name, check in conformance_cases(refused, Promises(error=0.05)):
        if name != "equals its copies":  # a class made here cannot be pickled
            check()
