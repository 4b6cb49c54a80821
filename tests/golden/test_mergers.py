"""The built-in mergers give what the authors' own code, or a float64 form of the papers' formulas, gave."""

import json

import attrs
import pytest
import torch

from kvpolicy.stages.slots import gather
from kvpolicy_plugins.mergers.d2o import D2O
from kvpolicy_plugins.mergers.pivot import Pivot
from kvpolicy_plugins.mergers.shared.merge_groups import evicted_of, nearest
from kvpolicy_plugins.mergers.tome import ToMe
from kvpolicy_plugins.mergers.weighted import Weighted
from kvpolicy_plugins.mergers.weightedkv import merged_values
from tests.golden.families import Vectors, cases, close, family_of, same
from tests.support.views import keep, view_of


@pytest.mark.parametrize("path", cases("test_mergers"), ids=lambda path: path.stem)
def test_published_results(path):
    vectors = Vectors(path)
    CHECKS[family_of(path.stem)](vectors)
    assert vectors.unread() == []


def in_slot_order(kept, *found):
    """Kept slots [B, K, N] ascending, and what the file says of them, [B, K, N, D], in the same order."""
    ordered, order = kept.sort(-1)
    return ordered, *(entries.gather(2, order[..., None].expand_as(entries)) for entries in found)


def check_merge_kv(v):
    keys, window = v["k"], v.parameter("window")
    view = view_of(keys, values=v["v"], recent=window)
    last = torch.arange(keys.shape[2])[-window:].expand(*keys.shape[:2], window)
    retained = torch.cat([v["kept_index"], last], -1)
    for merger in (Pivot(), Weighted()):
        kept, new_keys, new_values = in_slot_order(retained, v[f"k_{merger.name}"], v[f"v_{merger.name}"])
        entries = merger.merge(view, kept)
        close(entries.keys, new_keys)
        close(entries.values, new_values)
        values_only = attrs.evolve(merger, merge_keys=False).merge(view, kept)
        assert torch.equal(values_only.values, entries.values)
        assert torch.equal(values_only.keys, gather(keys, kept))


def check_reference(v):
    view = view_of(v["k"][None], values=v["v"][None], row_state={"threshold": torch.tensor([-torch.inf])})
    given = v["keep_idx"][None]
    kept, *merged = in_slot_order(given, *(v[name][None] for name in ("d2o_keys", "d2o_values", "weightedkv_values")))
    similarity, place = nearest(view.keys, kept, evicted_of(view, kept))
    evicted = v["evict_idx"][None]
    same(evicted_of(view, kept), torch.zeros_like(similarity).scatter(-1, evicted, 1.0))
    close(similarity.gather(-1, evicted)[0], v["max_sim"], atol=1e-12)
    same(kept.gather(-1, place.gather(-1, evicted))[0], given[0].gather(-1, v["argmax"]))

    entries = D2O(together="rank").merge(view, kept)  # the heads evict different positions
    close(entries.row_state["threshold"], v["d2o_threshold"][None])
    close(entries.keys, merged[0], atol=1e-12, rtol=1e-9)
    close(entries.values, merged[1], atol=1e-12, rtol=1e-9)
    takers = torch.zeros(kept.shape, dtype=torch.bool)
    for head, places in enumerate(place.gather(-1, evicted)[0]):
        takers[0, head, places[v["d2o_selected"]]] = True
    same(entries.changed, takers)

    close(merged_values(view, kept, v["avg_attention"][None]), merged[2], atol=1e-12, rtol=1e-9)


def check_tome(v):
    view = view_of(v["keys"], values=v["values"])
    for name in (name.removeprefix("cfg_") for name in v.like("cfg_*")):
        config = json.loads(v.text(f"cfg_{name}"))
        kept, keys, values = in_slot_order(v["kept_indices"], v[f"keys_{name}"], v[f"values_{name}"])
        same(keep(view, v["base_score"], max(1, int(view.keys.shape[2] * (1 - config["compression_ratio"])))), kept)
        merger = ToMe(config["similarity_threshold"], config["merge_fraction"])
        entries = merger.merge(view, kept)
        assert torch.equal(entries.keys, keys)
        nowhere = published_border_is_nan(view, kept, merger)[..., None]
        close(entries.values.where(~nowhere, gather(view.values, kept)), values)


def published_border_is_nan(view, kept, merger):
    """Bool [B, K, 1]: kvpress interpolates between -inf and a number, and merges nothing in that head."""
    evicted = evicted_of(view, kept)
    similarity = nearest(view.keys, kept, evicted)[0][evicted].reshape(*kept.shape[:2], -1)
    failed = similarity.masked_fill(similarity < merger.threshold, -torch.inf)
    return failed.quantile(1 - merger.fraction, dim=-1, keepdim=True).isnan() & (merger.fraction < 1)


CHECKS = {"merge_kv": check_merge_kv, "mergers_reference": check_reference, "tome_merging": check_tome}
