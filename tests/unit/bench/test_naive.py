"""The baselines do the work that ours does: on the same keys and queries they keep the same entries."""

import pytest
import torch

import kvpolicy
from kvpolicy.bench.baselines.naive import naive_of
from kvpolicy.bench.baselines.naive.layer_tensors import LayerTensors, gathered
from kvpolicy.bench.baselines.naive.window_votes import window_votes
from kvpolicy.bench.cases.filled_layers import due, plan_at, random_layers
from kvpolicy.bench.protocol.model_shapes import attention_shape

BUDGETS = {"snapkv": 48, "pyramidkv": 48, "rkv": 24, "adakv": 48, "tova": 24, "streaming_llm": 24}
WINDOWS = {"streaming_llm": {"protect": {"sinks": 4, "recent": 20}}}
SHAPE = attention_shape(1, 4, 2, 16)


def compressed(name, length, rows, keys):
    """What ours and the naive form leave of the same layer: rows of a head in ascending order of their keys."""
    policy = kvpolicy.load(name, budget=BUDGETS[name], **WINDOWS.get(name, {}))
    plan = plan_at(policy.spec, SHAPE, length, torch.float32, torch.device("cpu"))
    layers = random_layers(plan, SHAPE, rows, length, keys)
    cache, finish_forward = due(plan, SHAPE, layers)
    finish_forward()
    return layers[0], cache.managed[0], naive_of(policy.spec).run(layers[0], BUDGETS[name])


def kept_by_head(layer, column):
    rows = range(layer.storage.slots.layout.rows)
    view = layer.view(rows)
    entries = getattr(view, column)
    return [entries[row, head][view.valid[row, head]] for row in rows for head in range(SHAPE.kv_heads)]


def slots_of(entries, held):
    """Slots of a head [T, D] at which entries [n, D] stand, ascending."""
    slots = [(held == entry).all(-1).nonzero().item() for entry in entries]
    return sorted(slots)


@pytest.mark.parametrize("keys", ["shared", "isotropic"])
@pytest.mark.parametrize("length", [80, 200])
@pytest.mark.parametrize("name", ["rkv", "tova", "streaming_llm"])
def test_naive_form_keeps_what_ours_keeps(name, length, keys):
    held, layer, naive = compressed(name, length, 2, keys)

    assert layer.stats.compressions == 1
    for column, other in zip(("keys", "values"), naive, strict=True):
        stored = getattr(held, column).flatten(0, 1)
        for mine, its, head in zip(kept_by_head(layer, column), other.flatten(0, 1), stored, strict=True):
            assert slots_of(mine, head) == slots_of(its, head)


@pytest.mark.parametrize("keys", ["shared", "isotropic"])
@pytest.mark.parametrize("length", [80, 200])
@pytest.mark.parametrize("name", ["snapkv", "pyramidkv"])
def test_naive_votes_decide_as_ours_do(name, length, keys):
    """Pooling gives neighbours equal votes, and PyTorch's top-k may take any of them: the votes kept are compared."""
    held, layer, naive = compressed(name, length, 2, keys)
    window = held.queries.shape[2]
    votes = torch.nn.functional.pad(window_votes(held), (0, window), value=9.0).flatten(0, 1)
    heads = zip(kept_by_head(layer, "keys"), naive[0].flatten(0, 1), held.keys.flatten(0, 1), votes, strict=True)

    for mine, its, head, vote in heads:
        ours, theirs = slots_of(mine, head), slots_of(its, head)
        assert sorted(vote[ours].tolist()) == sorted(vote[theirs].tolist())
        assert len(set(ours) ^ set(theirs)) <= 6
        assert set(range(length - window, length)) <= set(ours) & set(theirs)


def test_naive_adakv_gives_every_layer_as_many_entries_as_ours():
    """Ours gives each head a least share besides, so only the total and what is kept by both can be compared."""
    _, layer, naive = compressed("adakv", 200, 1, "shared")
    ours = kept_by_head(layer, "keys")

    assert sum(len(one) for one in ours) == sum(keys.shape[2] for keys, _ in naive) == 2 * BUDGETS["adakv"]
    assert len({keys.shape[2] for keys, _ in naive}) == 2
    for mine, (keys, values) in zip(ours, naive, strict=True):
        assert keys.shape == values.shape
        shared = {tuple(row.tolist()) for row in mine} & {tuple(row.tolist()) for row in keys[0, 0]}
        assert len(shared) >= 32  # the window at least


def test_gather_takes_chosen_and_recent_slots():
    random = torch.Generator().manual_seed(0)
    layer = LayerTensors(*(torch.randn(1, 2, 10, 16, generator=random) for _ in range(3)), 1.0)
    chosen = torch.tensor([[[0, 5], [3, 1]]])
    keys, values = gathered(layer, chosen, recent=2)

    assert torch.equal(keys[0, 1], layer.keys[0, 1, [3, 1, 8, 9]])
    assert torch.equal(values[0, 0], layer.values[0, 0, [0, 5, 8, 9]])


def test_policies_of_one_s_own_have_no_naive_form():
    spec = kvpolicy.load("gkv").spec
    assert naive_of(spec) is None
