"""KVzip's scores and kept sets, as its authors' code and another library give them."""

import json
from functools import partial

import attrs
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvpolicy
from kvpolicy.plan.forward_observers import state_name
from kvpolicy.stages import AllocationRequest, Pass, QueryLogits
from kvpolicy_plugins.allocators.global_ranking import GlobalRanking
from kvpolicy_plugins.scorers.attention_based.reconstruction import Reconstruction
from kvpolicy_plugins.selectors.topk import TopK
from tests.golden.families import Vectors, cases, close, family_of
from tests.support.selecting import selected_by


@pytest.mark.parametrize("path", cases("test_kvzip"), ids=lambda path: path.stem)
def test_published_results(path):
    vectors = Vectors(path)
    CHECKS[family_of(path.stem)](vectors)
    assert vectors.unread() == []


def observed(v, layer, slots):
    """The state after all passes over a context, float32 [1, K, n]; positions begin behind the sinks."""
    cached, sinks = v[f"cache_keys_l{layer}"], int(v["sink"])
    most = torch.zeros(*cached.shape[:2], slots)
    start = sinks
    for number, (size, count) in enumerate(zip(v["chunk_sizes"].tolist(), v["q_lens"].tolist(), strict=True)):
        queries, own_keys = v[f"q_c{number}_l{layer}"], v[f"k_new_c{number}_l{layer}"]
        assert queries.shape[2] == own_keys.shape[2] == count
        grouped = queries.unflatten(1, (cached.shape[1], -1)) * queries.shape[-1] ** -0.5
        logits = grouped @ cached[:, :, None].transpose(-1, -2)
        shown = torch.zeros(cached.shape[2], dtype=torch.bool)
        shown[:sinks], shown[start : start + size] = True, True
        later = torch.ones(count, count, dtype=torch.bool).triu(1)
        own = (grouped @ own_keys[:, :, None].transpose(-1, -2)).masked_fill(later, -torch.inf).logsumexp(-1)
        seen = QueryLogits(logits.masked_fill(~shown, -torch.inf), own=own)
        state = {"most": torch.nn.functional.pad(most, (sinks, 0))}
        most = Reconstruction().observe_pass(seen, state)["most"][..., sinks:]
        start += size
    return most


def check_scoring(v):
    scores = v["score"]
    layers, _, heads, slots = scores.shape
    for layer in range(layers):
        close(observed(v, layer, slots), scores[layer])
    close(scores.amax(-1), v["head_score"])
    for name in v.like("valid_r*"):
        valid, share = v[name], int(name.removeprefix("valid_r"))
        # The published code keeps what scores more than the last of the best int(r·L·K·n), which is one entry less.
        assert 1 <= slots * heads * layers * share / 100 - int(valid.sum()) <= 2
        threshold = v[f"thres_r{share}"]
        assert scores[valid].amin() > threshold >= scores[~valid].amax()
        request = AllocationRequest(
            room=torch.full((layers, 1, heads), slots),
            total=valid.sum()[None],
            protected=torch.zeros(layers, 1, heads, dtype=torch.int64),
            tokens=torch.tensor([slots]),
            won=partial(owned, scores),
        )
        assert torch.equal(best(scores, GlobalRanking().allocate(request)), valid)
        assert torch.equal(
            best(scores, torch.full((layers, 1, heads), slots * share // 100)), v[f"valid_uniform_r{share}"]
        )


def owned(scores, total):
    """How many of the best `total` [1] of all scores [L, 1, K, n] are in each head, int64 [L, 1, K]."""
    last = scores.flatten().sort(descending=True).values[total - 1]
    return (scores >= last).sum(-1)


def best(scores, counts):
    """The best of each head, bool [L, 1, K, n]."""
    everywhere = torch.ones_like(scores, dtype=torch.bool)
    return selected_by(TopK(), *(part.flatten(0, 1) for part in (scores, everywhere, counts))).view_as(everywhere)


@attrs.frozen
class Recorded(Reconstruction):
    """With passes as another library had them: they begin with an instruction."""

    tokens: tuple = ()

    def passes(self, prompt):
        made = super().passes(prompt)
        return [Pass(tokens, own.spans) for tokens, own in zip(self.tokens, made, strict=True)]


def model_of(v):
    given = json.loads(v.text("config"))
    rope = {"rope_theta": given.pop("rope_theta"), "rope_type": "default"}
    model = LlamaForCausalLM(LlamaConfig(**given, rope_parameters=rope, tie_word_embeddings=False)).eval()
    model.load_state_dict({name.removeprefix("param:"): v[name] for name in v.like("param:*")})
    return model


def check_end_to_end(v):
    model, tokens, sinks = model_of(v), v["input_ids"], int(v["n_sink"])
    assert int(v["prefix_length"]) == sinks, "what is behind the sinks would be scored by a rule of its own"
    masks = [v[f"kept_mask_l{layer}"] for layer in range(model.config.num_hidden_layers)]
    total, pairs = sum(int(mask.sum()) for mask in masks), sum(len(mask) for mask in masks)
    assert total == pytest.approx(pairs * tokens.shape[1] * (1 - float(v["compression_ratio"])), abs=1)
    assert total % pairs == 0, "budgets are whole entries per head"
    policy = kvpolicy.load(
        "kvzip_plus" if bool(v["plus"]) else "kvzip", budget=total // pairs, protect={"sinks": sinks}
    )
    passes = tuple(v[name][0] for name in v.like("repeat_ids_*"))
    scorer = Recorded(int(v["chunk_size"]), weigh=policy.spec.score[0].scorer.weigh, tokens=passes)
    term = attrs.evolve(policy.spec.score[0], scorer=scorer)
    policy = attrs.evolve(policy, spec=attrs.evolve(policy.spec, score=(term,)))
    with policy.attach(model) as attachment, torch.no_grad():
        cache = attachment.cache()
        model(tokens, past_key_values=cache)
        views = [layer.view([0]) for layer in cache.managed]
    for layer, (mask, view) in enumerate(zip(masks, views, strict=True)):
        for head, (kept, length) in enumerate(zip(mask, view.lengths[0].tolist(), strict=True)):
            positions = view.positions[0, head, :length].long()
            assert positions.tolist() == kept.nonzero()[:, 0].tolist()
            close(view.keys[0, head, :length], v[f"keys_l{layer}"][0, head, positions])
            close(view.values[0, head, :length], v[f"values_l{layer}"][0, head, positions])
            scores = scorer.score(attrs.evolve(view, slot_state={"most": view.slot_state[state_name(0, "most")]}))
            close(scores[0, head, sinks:length], v["score"][layer, 0, head, positions[sinks:]], rtol=1e-3)


CHECKS = {
    "kvzip_scoring": check_scoring,
    "kvzip_end_to_end": check_end_to_end,
    "kvzip_end_to_end_plus": check_end_to_end,
}
