"""Small layers are compressed as the rows of one view: with what each of them would be left with by itself."""

import attrs
import pytest
import torch

import kvpolicy
from kvpolicy.errors import NonFiniteScoreWarning
from kvpolicy.plan.compress import blocks
from kvpolicy.plan.compress.blocks import blocks_of
from kvpolicy.plan.compress.step import compress
from kvpolicy.stages.conformance.samples import sample_view
from tests.support.models import build, prompt
from tests.support.policies import held, small

LAYERS, BUDGET = 5, 9
LENGTHS = ((23, 23), (17, 17))
POLICIES = {
    "h2o": small("h2o"),
    "snapkv": small("snapkv"),
    "rkv": small("rkv"),
    "keepkv": small("keepkv"),
    "adakv": small("adakv"),
    "pyramidkv": small("pyramidkv"),
}


def views(spec):
    """Layers of different entries, shown as the plugins of a policy need it."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=random, dtype=torch.float32)

    shown = []
    for layer in range(LAYERS):
        view = sample_view(lengths=LENGTHS)
        shape = view.keys.shape
        states = {state.name: normal(*shape[:3]) for state in spec.merge.slot_state()}
        view = attrs.evolve(
            view,
            layer=layer,
            keys=normal(*shape),
            values=normal(*shape),
            queries=normal(shape[0], 4, 6, shape[3]),
            query_positions=torch.tensor([[17, 18, 19, 20, 21, 22], [-1, 12, 13, 14, 15, 16]]),
            attention=normal(*shape[:2], 2, shape[2]).abs(),
            log_votes=normal(*shape[:3]).abs() if spec.merge.votes else None,
            slot_state={f"merge.{name}": state.abs() for name, state in states.items()},
        )
        shown.append(view)
    return shown


def left(spec, layers, budgets):
    """What every layer is left with."""
    shown = [[lambda view=view: view for view in layers]]
    return [one for results in compress(spec, None, shown, budgets, torch.tensor([23, 17])) for one in results]


def budgets(uneven):
    return torch.tensor([[BUDGET + layer * uneven, BUDGET] for layer in range(LAYERS)])


@pytest.mark.parametrize("uneven", [0, 1], ids=["equal budgets", "a budget for each layer"])
@pytest.mark.parametrize("most", [2**18, 3 * 2 * 2 * 23 * 16], ids=["one block", "blocks of three and two"])
@pytest.mark.parametrize("name", POLICIES)
def test_layers_are_left_with_what_each_of_them_would_keep_alone(name, most, uneven, monkeypatch):
    spec = POLICIES[name].spec
    monkeypatch.setattr(blocks, "_NUMBERS", most)
    assert [block.layers for block in blocks_of(spec, views(spec))] == ([5] if most == 2**18 else [3, 2])
    together = left(spec, views(spec), budgets(uneven))
    alone = [left(spec, [view], budgets(uneven)[[layer]])[0] for layer, view in enumerate(views(spec))]
    assert len(together) == LAYERS
    for one, other in zip(together, alone, strict=True):
        assert torch.equal(one.kept, other.kept)
        assert one.lengths == other.lengths
        assert (one.entries is None) == (other.entries is None) == spec.merge.moves_only
        for first, second in zip(*map(tensors, (one, other)), strict=True):
            torch.testing.assert_close(first, second)


def tensors(result):
    entries = result.entries
    mine = [] if entries is None else [entries.keys, entries.values, entries.log_votes, entries.changed]
    return [*mine, *result.observed.values(), *result.slot_state.values(), *result.row_state.values()]


def test_a_fault_in_one_layer_leaves_the_others_as_they_are():
    spec = POLICIES["keepkv"].spec
    sound, faulty = views(spec), views(spec)
    faulty[2].keys[0, 1, 8] = torch.nan
    with pytest.warns(NonFiniteScoreWarning):
        found = left(spec, faulty, budgets(0))
    for layer, (one, other) in enumerate(zip(found, left(spec, sound, budgets(0)), strict=True)):
        if layer != 2:
            assert torch.equal(one.kept, other.kept)
            torch.testing.assert_close(one.entries.keys, other.entries.keys)
        assert one.entries.keys[one.kept >= 0].isfinite().all() or layer == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda view: attrs.evolve(view, scaling=0.5),
        lambda view: attrs.evolve(view, recent=1),
        lambda view: attrs.evolve(view, in_order=False),
        lambda view: attrs.evolve(view, pinned=torch.zeros_like(view.valid)),
        lambda view: attrs.evolve(view, queries=view.queries[:, :, 1:], query_positions=view.query_positions[:, 1:]),
    ],
)
def test_layers_that_differ_are_shown_one_by_one(change):
    spec = POLICIES["snapkv"].spec
    shown = views(spec)
    shown[3] = change(shown[3])
    assert [block.view for block in blocks_of(spec, shown)] == shown


@pytest.mark.parametrize("name", ["vase", "criticalkv", "kvcrush"])
def test_plugins_that_know_the_layer_are_shown_one_after_the_other(name):
    spec = small(name).spec
    assert len(blocks_of(spec, views(spec))) == LAYERS


@pytest.mark.parametrize("name", ["h2o", "keepkv", "snapkv"])
def test_a_model_goes_on_as_if_its_layers_were_compressed_one_by_one(name, monkeypatch):
    """Compressed at every token: one block of all layers, against none."""
    one, (tokens, mask) = build(num_hidden_layers=4), prompt(30, 22)
    found = {}
    for most in (0, 2**18):
        monkeypatch.setattr(blocks, "_NUMBERS", most)
        with small(name, every=1).attach(one) as attachment, torch.no_grad():
            cache = attachment.cache()
            one(tokens, attention_mask=mask, past_key_values=cache)
            for step in range(5):
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
                logits = one(tokens[:, step : step + 1], attention_mask=mask, past_key_values=cache).logits
            cache.check_integrity()
            mask, found[most] = prompt(30, 22)[1], (logits, held(cache))
    assert found[0][1] == found[2**18][1]
    torch.testing.assert_close(found[0][0], found[2**18][0], rtol=1e-4, atol=1e-4)


def test_the_policies_that_merge_at_every_token_are_among_them():
    assert all(blocks.layers_as_rows(kvpolicy.load(name).spec) for name in ("h2o", "keepkv", "snapkv", "rkv", "tova"))
