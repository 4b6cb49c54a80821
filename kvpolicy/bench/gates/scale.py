"""Sizes at which the gates measure: those of the claims, or tiny ones for a smoke test."""

import attrs

from kvpolicy.bench.protocol.model_shapes import ModelShape, attention_shape, model_shape


@attrs.frozen
class Scale:
    """Sizes of the claims."""

    attention: ModelShape = attention_shape(1, 32, 8, 128)
    model: ModelShape = model_shape("267m")
    small: ModelShape = model_shape("small")
    snapkv: int = 8192
    rkv: int = 4096
    moved: int = 1152
    moving: ModelShape = attention_shape(16, 32, 8, 128)  # all layers of a model: so many are compressed in one go
    decode: int = 16_384
    budget: int = 1024
    short: int = 1024  # tokens of context for attaching without evicting
    old: int = 51_200
    real: ModelShape = model_shape("135m")  # that of SmolLM2-135M
    packed: tuple[int, ...] = (2048, 8192)  # tokens, all of which are held
    chunk: int = 256  # tokens behind the fewest of these
    prompt: int = 2048
    context: int = 6144  # tokens that are cut to a tenth
    thin: ModelShape = ModelShape(30, 4, 2, 32, 64, 128, 256)  # its arithmetic is next to nothing
    thin_context: int = 300
    thin_budget: int = 128
    thin_rows: tuple[int, ...] = (1, 8)
    wide: ModelShape = ModelShape(30, 8, 8, 8, 64, 128, 256)  # many heads
    wide_rows: int = 64
    wide_context: int = 32
    rounds: int = 7


QUICK = Scale(
    attention=attention_shape(1, 4, 2, 16),
    model=model_shape("tiny"),
    small=model_shape("tiny"),
    snapkv=128,
    rkv=128,
    moved=96,
    moving=attention_shape(2, 4, 2, 16),
    decode=256,
    budget=64,
    short=64,
    old=512,
    real=ModelShape(2, 4, 2, 32, 64, 128, 128),
    packed=(192, 256),
    chunk=16,
    prompt=192,
    context=640,
    thin=ModelShape(2, 4, 2, 32, 64, 128, 128),
    thin_rows=(2,),
    wide=model_shape("tiny"),
    wide_rows=3,
    rounds=3,
)
