"""Decode steps of fixed shapes that compress in kernels: the same tokens and entries, and nothing waits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kvpolicy_kernels.compact.compact
from kvpolicy.integrations.transformers.attachment import Attachment
from kvpolicy.integrations.transformers.decode_graph import evict
from kvpolicy.integrations.transformers.decode_graph.runners import Mode
from kvpolicy.integrations.transformers.models.support import geometry_of
from kvpolicy.plan.compress.kernels import FusedLayers
from kvpolicy.plan.plan import compile_policy
from kvpolicy_kernels import UnsupportedInputError
from tests.support.alone import repeat
from tests.support.decisions import Decisions
from tests.support.models import build, generate, prompt
from tests.support.policies import held, small

LAYERS, STEPS = 2, 9
ROWS = (25, 14)
NAMES = ("snapkv", "rkv", "gkv", "h2o")
WAITING = {"aten::_local_scalar_dense", "aten::nonzero", "aten::lift_fresh", "aten::equal"}


@pytest.fixture
def rounds(monkeypatch):
    """Whether kernels did it, for each round of compressions in static storage."""
    found, inner = [], evict._choose

    def choose(*given):
        kept, groups = inner(*given)
        found.append(all(isinstance(group, FusedLayers) for group in groups))
        return kept, groups

    monkeypatch.setattr(evict, "_choose", choose)
    return found


def both(name, *, backend=None):
    """The sequences, the positions held and the compressions without kernels and with them, which repeat decisions."""
    decisions = Decisions()
    with decisions.watched():
        expected, *plain = run(name, kernels=False)
    yield expected.sequences, *plain
    with decisions.followed():
        found, *layers = run(name, expected, kernels=True, backend=backend)
    yield found.sequences, *layers


def run(name, expected=None, *, kernels, backend=None):
    model = build("llama", num_hidden_layers=LAYERS)
    policy = small(name, 20, 4, protect={"recent": 4})
    plan = compile_policy(policy.spec, geometry_of(model.config), "cpu", torch.float32, kernels=kernels)
    with Attachment(plan, model, Mode(backend)) as attachment:
        options = {"count": STEPS, "past_key_values": (cache := attachment.cache())}
        if expected is None:
            output = generate(model, *prompt(*ROWS), **options)
        else:
            output = repeat(expected, slice(None), model, *prompt(*ROWS), **options)
        return output, held(cache), [layer.compressions for layer in attachment.report().layers]


@pytest.mark.parametrize("name", NAMES)
def test_kernels_keep_what_the_references_keep(name, rounds):
    runs = both(name)
    expected = next(runs)
    assert not any(rounds)
    rounds.clear()
    found = next(runs)

    assert torch.equal(found[0], expected[0])
    assert found[1:] == expected[1:]
    assert len(rounds) >= 2
    assert all(rounds)


def test_a_compiled_step_compresses_in_kernels_too(rounds):
    """As one operator, which is given the storages themselves."""
    runs = both("rkv", backend="aot_eager")
    expected = next(runs)
    rounds.clear()
    found = next(runs)

    assert torch.equal(found[0], expected[0])
    assert found[1:] == expected[1:]
    assert len(rounds) >= 2
    assert all(rounds)


@pytest.mark.parametrize("what", ["scores", "moves"])
def test_a_launch_that_is_refused_is_said_once(what, monkeypatch, caplog, rounds):
    """The references run instead, with the same tokens."""
    expected, *plain = run("gkv", kernels=False)

    choose_on_device = evict.choose_on_device

    def refuse(*_args, **_named):
        raise UnsupportedInputError("no such luck")

    def refuse_kernels(spec, fusion, *rest):
        return refuse() if fusion else choose_on_device(spec, fusion, *rest)

    if what == "scores":
        monkeypatch.setattr(evict, "choose_on_device", refuse_kernels)
    else:
        monkeypatch.setattr(kvpolicy_kernels.compact.compact, "compact", refuse)
    found, *layers = run("gkv", kernels=True)

    assert torch.equal(found.sequences, expected.sequences)
    assert layers == plain
    assert len(rounds) >= 2
    assert any(rounds) == (what == "moves")
    assert [one.message for one in caplog.records if "no such luck" in one.message] == [caplog.records[0].message]


class Unwaiting(TorchDispatchMode):
    """Refuses what makes a host wait for a GPU, or sends it numbers: neither can be captured."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func._schema.name not in WAITING, f"{func} waits"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", sorted({*NAMES} - {"gkv"}))  # whose reference asks a host's tensors, and no other's
def test_only_the_first_round_may_wait(name, monkeypatch):
    """Captured steps have run before: tables of addresses are there by then."""
    seen, inner = [], evict._evict

    def watched(*given):
        seen.append(None)
        if len(seen) == 1:
            return inner(*given)
        with Unwaiting():
            return inner(*given)

    monkeypatch.setattr(evict, "_evict", watched)
    run(name, kernels=True)

    assert len(seen) >= 2


def test_waiting_is_noticed():
    with Unwaiting(), pytest.raises(AssertionError, match="waits"):
        torch.ones(2).sum().item()
    with Unwaiting(), pytest.raises(AssertionError, match="waits"):
        torch.tensor([1])
