"""The digest of a model: what it depends on, and what it does not."""

import copy
import types

import pytest
import torch

import kvpolicy
from kvpolicy.errors import CalibrationError
from kvpolicy.integrations.transformers.saving.model_digest import model_digest
from tests.support.models import build, generate, model, prompt

MANY = 2**24 + 3  # more than a float32 can count


@pytest.fixture
def standing():
    """A setting of torch's that is put back."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


def with_weight(weight, one=None):
    """A model with one more weight."""
    one = build() if one is None else one
    one.register_parameter("more", torch.nn.Parameter(weight, requires_grad=False))
    return one


@pytest.mark.parametrize("rest", [(), (2,)])
def test_weights_of_any_size_are_counted(rest):
    """Without a copy of them: the second is a view of 2^60 numbers."""
    shape = (2**30, 2**30) if rest else (MANY,)
    weight = torch.zeros((), dtype=torch.bfloat16).expand(shape) if rest else torch.zeros(shape, dtype=torch.bfloat16)
    assert len(model_digest(with_weight(weight))) == 16


def test_the_first_and_the_last_value_of_a_long_weight_count():
    weight = torch.zeros(MANY, dtype=torch.bfloat16)
    found = {model_digest(with_weight(weight))}
    for place in (0, MANY - 1):
        other = weight.clone()
        other[place] = 1.0
        found.add(model_digest(with_weight(other)))
    assert len(found) == 3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_the_default_dtype_does_not_matter(standing, dtype):
    one = build()
    before = model_digest(one)
    standing(dtype)
    assert model_digest(one) == before


@pytest.mark.parametrize("name", ["sals25", "tada"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_calibrating_and_attaching_do_not_mind_the_default_dtype(standing, name, dtype):
    """The same tensors, and the same tokens."""
    one, tokens = build(hidden_size=128, head_dim=32), prompt(40)
    policy = kvpolicy.load(name)
    expected = policy.calibrate(one, tokens[0])
    with policy.attach(one, calibration=expected):
        wanted = generate(one, *tokens, count=4).sequences
    standing(dtype)
    found = policy.calibrate(one, tokens[0])
    for left, right in zip(found.layers, expected.layers, strict=True):
        assert left.keys() == right.keys()
        assert all(torch.equal(left[key], right[key]) for key in left)
    with policy.attach(one, calibration=expected):
        assert torch.equal(generate(one, *tokens, count=4).sequences, wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_does_not_matter(dtype):
    assert model_digest(build().to(dtype)) == model_digest(build())


def test_the_dtype_of_a_part_of_the_configuration_does_not_matter():
    one, other = build(), build()
    one.config.text = {"dtype": "float32", "size": 1}
    other.config.text = {"dtype": "bfloat16", "size": 1}
    assert model_digest(one) == model_digest(other)
    other.config.text = {"dtype": "bfloat16", "size": 2}
    assert model_digest(one) != model_digest(other)


def test_sharing_memory_does_not_matter():
    tied, apart = build(tie_word_embeddings=True), build(tie_word_embeddings=True)
    apart.lm_head.weight = torch.nn.Parameter(apart.model.embed_tokens.weight.detach().clone())
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert model_digest(tied) == model_digest(apart)
    with torch.no_grad():
        apart.lm_head.weight.add_(1)
    assert model_digest(tied) != model_digest(apart)


@pytest.mark.parametrize(
    "weight",
    [
        torch.empty(0),
        torch.empty(3, 0, 2),
        torch.tensor(2.5),
        torch.tensor([3.0]),
        torch.arange(200, dtype=torch.uint8),
        torch.arange(200, dtype=torch.int8).reshape(10, 20).T,
        torch.tensor([True, False]),
        torch.tensor([float("nan"), float("inf")]),
        torch.ones(5, dtype=torch.complex64),
        torch.ones(70, dtype=torch.float8_e4m3fn),
        torch.ones(70, dtype=torch.uint32),
    ],
    ids=lambda weight: f"{weight.dtype}-{list(weight.shape)}".removeprefix("torch."),
)
def test_weights_of_any_kind(weight):
    assert model_digest(with_weight(weight)) == model_digest(with_weight(weight.clone())) != model_digest(build())


def test_whole_numbers_are_not_rounded():
    """Quantised weights are codes, and bfloat16 has 8 bits of significand."""
    codes = torch.full((100,), 1000, dtype=torch.int32)
    assert model_digest(with_weight(codes)) != model_digest(with_weight(codes + 1))


def test_quantised_weights_in_buffers_count():
    found = set()
    for code in (1, 2):
        one = build()
        one.register_buffer("qweight", torch.full((8,), code, dtype=torch.int32))
        one.register_buffer("scratch", torch.full((8,), float(code)), persistent=False)
        found.add(model_digest(one))
    assert len(found) == 2
    one.scratch.zero_()
    assert model_digest(one) in found


def test_a_weight_is_found_wherever_it_stands():
    before, one = model_digest(build()), build()
    with torch.no_grad():
        one.model.layers[1].mlp.up_proj.weight.view(-1)[-1] += 1
    assert model_digest(one) != before


def offloaded(one, *, above=False):
    """As accelerate leaves a model: a weight on no device, and a hook that knows where it is."""
    place, holder = one.model.layers[0].mlp.up_proj, one.model.layers[0] if above else None
    holder = place if holder is None else holder
    name = "mlp.up_proj.weight" if above else "weight"
    kept = place.weight.detach().clone()
    place.weight = torch.nn.Parameter(kept.to("meta"))
    other = types.SimpleNamespace(weights_map=None)
    holder._hf_hook = types.SimpleNamespace(hooks=(other, types.SimpleNamespace(weights_map={name: kept})))
    return one


@pytest.mark.parametrize("above", [False, True])
def test_weights_that_are_kept_elsewhere_are_looked_up(above):
    assert model_digest(offloaded(build(), above=above)) == model_digest(build())


def test_weights_that_cannot_be_read_are_said():
    one = build()
    one.model.layers[0].mlp.up_proj.weight = torch.nn.Parameter(torch.empty(48, 32, device="meta"))
    with pytest.raises(CalibrationError, match=r"'model\.layers\.0\.mlp\.up_proj\.weight' is not loaded"):
        model_digest(one)


class Unreadable(torch.Tensor):
    """A tensor subclass that only its own library can read."""

    @classmethod
    def __torch_function__(cls, function, kinds, args=(), kwargs=None):
        if function is torch.Tensor.__getitem__:
            raise NotImplementedError("packed")
        return super().__torch_function__(function, kinds, args, kwargs or {})


def test_weights_of_a_kind_that_cannot_be_read_are_said():
    one = copy.deepcopy(model())
    one._buffers["codes"] = torch.ones(4).as_subclass(Unreadable)
    with pytest.raises(CalibrationError, match=r"its weight 'codes' \(Unreadable, torch\.float32\) cannot be read"):
        model_digest(one)
