"""No floating tensor of the product gets its dtype from torch's default: what anybody sets there changes no bit."""

import ast
from pathlib import Path

import attrs
import pytest
import torch

import kvpolicy
import kvpolicy_kernels
import kvpolicy_plugins
from kvpolicy.plan.plan import compile_policy
from kvpolicy.stages import Geometry
from kvpolicy.stages.conformance.samples import sample_view
from kvpolicy_plugins.scorers.attention_free.cur import Cur
from kvpolicy_plugins.scorers.attention_free.keydiff import KeyDiff
from kvpolicy_plugins.scorers.attention_free.lagkv import LagKV
from kvpolicy_plugins.scorers.attention_free.leverage import Leverage
from tests.property.test_faulty_merges import MERGERS, kept_of, merged, parts, view_for
from tests.support.compressing import compress_layers
from tests.support.models import build, generate, prompt
from tests.support.policies import NAMES, small
from tests.unit.plan.test_faults import DIM, GROUP, HEADS, seen

SOURCES = [
    file
    for package in (kvpolicy, kvpolicy_plugins, kvpolicy_kernels)
    for file in sorted(Path(package.__file__).parent.rglob("*.py"))
]
ALWAYS = {"zeros", "ones", "empty", "rand", "randn", "linspace", "logspace", "eye", "normal", "empty_strided"}
BY_VALUE = {"full", "tensor", "as_tensor", "scalar_tensor", "arange"}  # integers give integers


def unnamed(source):
    """Lines that make a tensor whose dtype, as far as can be read, is torch's default."""
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
            continue
        named = any(keyword.arg in ("dtype", "out", None) for keyword in node.keywords)
        kind = node.func.attr
        if not named and (kind in ALWAYS or (kind in BY_VALUE and _may_be_a_float(kind, node.args))):
            yield node.lineno


def _may_be_a_float(kind, arguments):
    if kind == "full":
        value = arguments[1]
        return not (isinstance(value, ast.Constant) and isinstance(value.value, int)) and not _negative(value)
    return any(_is_float(part) for argument in arguments for part in ast.walk(argument))


def _negative(value):
    inner = isinstance(value, ast.UnaryOp) and value.operand
    return isinstance(inner, ast.Constant) and isinstance(inner.value, int)


def _is_float(part):
    if isinstance(part, ast.Call):
        return isinstance(part.func, ast.Name) and part.func.id == "float"
    constant = isinstance(part, ast.Constant) and isinstance(part.value, float)
    return constant or (isinstance(part, ast.BinOp) and isinstance(part.op, ast.Div))


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("torch.zeros(3)", True),
        ("torch.full((3,), state.fill, device=device)", True),
        ("torch.full((3,), -torch.inf)", True),
        ("torch.full((3,), -1)", False),
        ("torch.tensor([1, 2.0])", True),
        ("torch.tensor(total / 2)", True),
        ("torch.tensor(lengths)", False),
        ("torch.arange(24.0)", True),
        ("torch.arange(n)", False),
        ("torch.rand(2, generator=random)", True),
        ("torch.rand(2, dtype=torch.float32)", False),
    ],
)
def test_the_check_sees_what_it_should(line, found):
    assert bool(list(unnamed(line))) == found


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: f"{file.parent.name}/{file.name}")
def test_every_floating_tensor_names_its_dtype(file):
    assert not list(unnamed(file.read_text()))


@pytest.fixture(params=[torch.bfloat16, torch.float64], ids=str)
def default(request):
    """Calls what it is given under another default dtype."""

    def under(make):
        before = torch.get_default_dtype()
        torch.set_default_dtype(request.param)
        try:
            return make()
        finally:
            torch.set_default_dtype(before)

    return under


ROUTES = {
    **{name: {} for name in (*NAMES, "d2o", "keepkv", "blend3")},
    "kivi": {"store": {"use": "kivi", "bits": 4, "group": 4, "residual": 8, "batch": 4}},
    "tada": {"store": {"use": "tada", "bits": 4, "residual": 4, "batch": 4}},
    "fp8": {"store": {"use": "fp8", "batch": 2}},
    "pages": {"read": {"use": "pages", "page": 4, "budget": 8, "dense_first": 0}},
}


def run(name, *, graph=False):
    policy = small(name if name in (*NAMES, "d2o", "keepkv", "blend3") else "snapkv", **ROUTES[name])
    tokens, mask = prompt(24, 17)
    with policy.attach(MODEL, graph=graph) as attachment:
        found = generate(MODEL, tokens, mask, count=7)
        assert attachment.report().nbytes
    return found


MODEL = build(num_hidden_layers=2)


@pytest.mark.parametrize("name", ROUTES)
def test_a_policy_computes_the_same_bits(name, default):
    expected, found = run(name), default(lambda: run(name))
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(left, right) for left, right in zip(found.logits, expected.logits, strict=True))


@pytest.mark.parametrize("name", ["h2o", "gkv"])
def test_steps_of_fixed_shapes_compute_the_same_bits(name, default):
    expected, found = run(name, graph=True), default(lambda: run(name, graph=True))
    assert all(torch.equal(left, right) for left, right in zip(found.logits, expected.logits, strict=True))


@pytest.mark.parametrize("merger", MERGERS.values(), ids=MERGERS)
def test_a_merger_merges_the_same_bits(merger, default):
    def made():
        view = view_for(merger)
        return parts(merged(merger, view, kept_of(view)))

    for found, expected in zip(default(made), made(), strict=True):
        assert all(torch.equal(found[name], one) and found[name].dtype == one.dtype for name, one in expected.items())


@pytest.mark.parametrize(
    "scorer", [KeyDiff(), LagKV(1, 4), LagKV(1, 20), Cur("average"), Cur(rank=3, window=0), Leverage(5)], ids=str
)
def test_a_scorer_gives_the_same_bits(scorer, default):
    view = sample_view(scorer)
    assert torch.equal(default(lambda: scorer.score(view)), scorer.score(view))


def test_kernels_choose_the_same_entries(default):
    spec = small("adakv", protect={"sinks": 0, "recent": 2}).spec
    geometry, view = Geometry((0,), HEADS * GROUP, HEADS, DIM), seen(window=32)

    def made():
        plan = compile_policy(spec, geometry, "cpu", torch.float32, kernels=True)
        assert not plan.fusion.off
        return compress_layers(plan, [view], [[9, 9]])[0].kept

    assert torch.equal(default(made), made())


def test_samples_of_the_conformance_suite_are_the_same(default):
    one, other = sample_view(), default(sample_view)
    assert torch.equal(one.keys, other.keys)
    assert attrs.evolve(other).keys.dtype == torch.float32
