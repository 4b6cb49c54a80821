"""Entries scored by the attention that they get while the model reads the prompt again, against the plain model.

The oracle runs the plain model on [prompt, chunk] for every chunk of the prompt, without a cache, and takes the weights
that the chunk's queries give from the model's own eager attention. What an entry of a KV head is worth is the largest
weight that any query head of its group gives it in any chunk; the protected and the best ones are held. Of KVzip+ each
weight is first multiplied with the length of the value behind the output projection, and divided by that of the hidden
state that the query is made of, both computed by the modules of the plain model from its own hidden states.
"""

import numpy as np
import pytest
import torch

from kvpolicy_plugins.scorers.attention_based.reconstruction import Reconstruction
from kvpolicy_plugins.scorers.history import History
from tests.support.models import build, prompt
from tests.support.oracle import attending_by
from tests.support.policies import held
from tests.support.rereading import Reread, read, rereading

BUDGET, SINKS, RECENT = 12, 2, 4
CLEAR = 2e-5  # as a share of the largest weight: a hundred times what rounding does to one
SEEDS = range(8)


def weights(one, tokens, chunk):
    """Of each layer, what the queries of a chunk behind the tokens [1, n] give to everything: [K, G, m, n + m]."""
    one.set_attn_implementation("eager")
    with torch.no_grad():
        found = one(torch.cat([tokens, chunk], 1), output_attentions=True, use_cache=False).attentions
    heads = one.config.num_key_value_heads
    return [layer[0, :, tokens.shape[1] :].double().unflatten(0, (heads, -1)).numpy() for layer in found]


def shares(one, tokens, chunk):
    """Of each layer, ‖v W‖ / ‖h‖ for values of the tokens and queries of the chunk: [K, G, m, n]."""
    with torch.no_grad():
        states = one(torch.cat([tokens, chunk], 1), output_hidden_states=True, use_cache=False).hidden_states
        layers = one.get_decoder().layers
        given = zip(layers, states[: len(layers)], strict=True)  # the last ones are behind the last layer
        return [_shares(one.config, layer, state, tokens.shape[1]) for layer, state in given]


def _shares(config, layer, given, count):
    attention, states = layer.self_attn, layer.input_layernorm(given)[0]
    group = config.num_attention_heads // config.num_key_value_heads
    values = attention.v_proj(states[:count]).double().unflatten(-1, (config.num_key_value_heads, -1))
    weight = attention.o_proj.weight.double()
    lengths = np.zeros((config.num_key_value_heads, group, 1, count))
    dim = values.shape[-1]
    for head in range(config.num_attention_heads):
        added = values[:, head // group] @ weight[:, head * dim : (head + 1) * dim].T
        lengths[head // group, head % group, 0] = added.square().sum(-1).sqrt().numpy()
    return lengths / states[count:].double().square().sum(-1).sqrt().numpy()[:, None]


def largest_weights(one, tokens, size, *, nearby=False, first=0, overlap=0, weighed=False):
    """By layer, the largest weight of every entry [K, n]; of those that a pass is shown, and of its own entries.

    Chunks are cut from the token `first` on, and begin with `overlap` tokens of the one before. `weighed`: KVzip+.
    """
    count = tokens.shape[1]
    layers = one.config.num_hidden_layers
    worth = np.zeros((layers, one.config.num_key_value_heads, count))
    for start in range(first, count, size):
        chunk = tokens[:, max(first, start - overlap) : start + size]
        shown = [*range(SINKS), *range(start, start + size)] if nearby else list(range(count))
        shown = sorted(set(shown) & set(range(count)))
        factors = shares(one, tokens, chunk) if weighed else None
        for layer, found in enumerate(weights(one, tokens, chunk)):
            given = found[..., shown]
            own = found[..., count:].sum(-1, keepdims=True)
            given = given / (given.sum(-1, keepdims=True) + own)
            given = given * factors[layer][..., shown] if weighed else given
            worth[layer][:, shown] = np.maximum(worth[layer][:, shown], given.max((1, 2)))
    return worth


def best(worth, budget=BUDGET):
    """The positions that a head holds, of `worth` [n], and how clear the cut is."""
    candidates = list(range(SINKS, len(worth) - RECENT))
    order = sorted(candidates, key=lambda position: (-worth[position], position))
    count = budget - SINKS - RECENT
    gap = (worth[order[count - 1]] - worth[order[count]]) / worth.max()
    return sorted([*range(SINKS), *order[:count], *range(len(worth) - RECENT, len(worth))]), gap


def assert_held(policy, architecture, lengths, size, **chunks):
    one, plain = build(architecture), build(architecture)
    for seed in SEEDS:
        tokens, mask = prompt(*lengths, seed=seed)
        expected, clear = [], np.inf
        for row, length in enumerate(lengths):
            worth = largest_weights(plain, tokens[row : row + 1, -length:], size, **chunks)
            kept = [[best(head) for head in layer] for layer in worth]
            expected.append([[positions for positions, _ in layer] for layer in kept])
            clear = min(clear, *(gap for layer in kept for _, gap in layer))
        if clear > CLEAR:
            break
    else:
        raise AssertionError("no prompt has decisions that rounding could not turn")
    with policy.attach(one) as attachment:
        cache = attachment.cache()
        read(one, cache, tokens, mask if min(lengths) < max(lengths) else None)
        cache.check_integrity()
        managed = [layer.stats.layer for layer in cache.managed]
        assert held(cache) == [[expected[row][layer] for row in range(len(lengths))] for layer in managed]


@pytest.mark.parametrize("size", [1, 5, 30, 64])
def test_what_is_attended_to_while_reading_again_stays(size):
    assert_held(rereading(scorer=Reread(size)), "llama", (30,), size)


@pytest.mark.parametrize("architecture", ["qwen3", "gemma3"])
def test_other_models(architecture):
    """Gemma 3 has layers with a sliding window of 16, beside those that are managed."""
    assert_held(rereading(), architecture, (37,), 5)


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_every_row_reads_its_own_prompt(architecture):
    assert_held(rereading(), architecture, (33, 21, 26), 5)


@pytest.mark.parametrize("lengths", [(30,), (30, 19)])
def test_a_pass_may_be_shown_some_entries_only(lengths):
    """The softmax is then over those, and over the pass itself."""
    assert_held(rereading(scorer=Reread(7, nearby=True)), "llama", lengths, 7, nearby=True)


@pytest.mark.parametrize(("architecture", "lengths"), [("llama", (30, 19)), ("gemma3", (37,))])
@pytest.mark.parametrize(("size", "overlap"), [(7, 3), (11, 20), (40, 8)])
def test_repeated_prompts(architecture, lengths, size, overlap):
    """KVzip: chunks of what follows the sinks, which all chunks see, each behind the end of the one before."""
    policy = rereading(scorer=Reconstruction(size, overlap))
    assert_held(policy, architecture, lengths, size, nearby=True, first=SINKS, overlap=overlap)


@pytest.mark.parametrize(
    ("architecture", "lengths", "size", "overlap"),
    [("llama", (30,), 7, 3), ("llama", (30, 19), 11, 20), ("qwen3", (30,), 7, 3), ("gemma3", (37, 29), 12, 8)],
)
def test_repeated_prompts_weighed_by_what_entries_add_to_the_hidden_state(architecture, lengths, size, overlap):
    """KVzip+."""
    policy = rereading(scorer=Reconstruction(size, overlap, "output_norm"))
    assert_held(policy, architecture, lengths, size, nearby=True, first=SINKS, overlap=overlap, weighed=True)


def test_a_history_of_what_is_seen_while_reading_again():
    """After one prompt there is nothing to combine with: the same entries stay."""
    policy = rereading(scorer=History(Reconstruction(7, 3), scale="none"))
    assert_held(policy, "llama", (30,), 7, nearby=True, first=SINKS, overlap=3)


def test_layers_and_heads_that_compete():
    """The best candidates of the whole model stay: here many more of one head than of another."""
    one, plain = build(), build()
    policy = rereading(allocate={"joint": {"use": "global"}})
    for seed in SEEDS:
        tokens, _ = prompt(30, seed=seed)
        worth = largest_weights(plain, tokens, 5)[..., SINKS : 30 - RECENT]
        ranked = np.sort(worth.flatten())[::-1]
        count = (BUDGET - SINKS - RECENT) * worth.shape[0] * worth.shape[1]
        if ranked[count - 1] - ranked[count] > CLEAR * ranked[0]:
            break
    with policy.attach(one) as attachment:
        cache = attachment.cache()
        read(one, cache, tokens)
        found = held(cache)
    for layer, heads in enumerate(worth):
        for head, own in enumerate(heads):
            kept = np.flatnonzero(own >= ranked[count - 1]) + SINKS
            assert found[layer][0][head] == [0, 1, *kept.tolist(), 26, 27, 28, 29]
    assert len({len(head) for layer in found for head in layer[0]}) > 1


class Masked:
    """The attention of the plain model in which each head of each layer sees what it is told; weights are kept."""

    def __init__(self, seen):
        self.seen, self.weights = seen, {}

    def __call__(self, module, query, key, value, attention_mask, scaling=None, **call):
        group = query.shape[1] // key.shape[1]
        logits = scaling * query @ key.repeat_interleave(group, 1).transpose(-1, -2)
        hidden = ~self.seen[module.layer_idx].repeat_interleave(group, 0)
        found = logits.masked_fill(hidden, -torch.inf).softmax(-1)
        self.weights[module.layer_idx] = found[0].double().unflatten(0, (-1, group)).numpy()
        return (found @ value.repeat_interleave(group, 1)).transpose(1, 2), None


def test_another_turn_is_read_over_what_is_left_of_the_first():
    """The second prompt alone is read again; entries of the first are seen in its passes, too."""
    one, plain, size, first, second = build(), build(), 5, 30, 13
    for seed in SEEDS:
        tokens, _ = prompt(first + second, seed=seed)
        total = first + second
        worth = np.zeros((3, 2, total))
        worth[:, :, :first] = largest_weights(plain, tokens[:, :first], size)
        left = [[best(head[:first]) for head in layer] for layer in worth]
        for start in range(first, total, size):
            chunk = tokens[:, start : min(start + size, total)]
            length = total + chunk.shape[1]
            seen = torch.ones(3, 2, length, length, dtype=torch.bool).tril()
            for layer, heads in enumerate(left):
                for head, (positions, _) in enumerate(heads):
                    gone = sorted(set(range(first)) - set(positions))
                    seen[layer, head, first:, gone] = False
            masked = Masked(seen)
            with attending_by(plain, masked), torch.no_grad():
                plain(torch.cat([tokens, chunk], 1), use_cache=False)
            for layer in range(3):
                worth[layer] = np.maximum(worth[layer], masked.weights[layer][:, :, total:, :total].max((1, 2)))
        for layer, heads in enumerate(left):
            for head, (positions, _) in enumerate(heads):
                worth[layer, head, sorted(set(range(first)) - set(positions))] = -1  # evicted
        kept = [[best(head) for head in layer] for layer in worth]
        if min(gap for layer in [*left, *kept] for _, gap in layer) > CLEAR:
            break
    else:
        raise AssertionError("no prompt has decisions that rounding could not turn")
    with rereading(scorer=Reread(size)).attach(one) as attachment:
        cache = attachment.cache()
        read(one, cache, tokens[:, :first])
        assert held(cache) == [[[positions for positions, _ in heads]] for heads in left]
        read(one, cache, tokens[:, first:])
        assert held(cache) == [[[positions for positions, _ in heads]] for heads in kept]
