"""CriticalKV and CriticalAdaKV keep what kvpress's classes keep, with the same base scores."""

import pytest
import torch

from kvpolicy.stages import SelectionRequest
from kvpolicy_plugins.selectors.critical import Critical
from kvpolicy_plugins.selectors.topk import TopK
from tests.golden.families import Vectors, cases, close
from tests.support.views import view_of


@pytest.mark.parametrize("path", cases("test_output_projection"), ids=lambda path: path.stem)
def test_published_results(path):
    v = Vectors(path)
    keys, values, scores = v["keys"], v["values"], v["base_score"]
    tokens, dim = values.shape[2:]
    view = view_of(keys, values=values, output_projection=v["wo"].T.unflatten(0, (-1, dim)))
    selector = Critical()
    norms = selector.second_scores(view)
    close(norms, v["wov_l1"])
    for name in v.like("score_r*"):
        share = 1 - int(name.removeprefix("score_r")) / 100
        kept = max(1, int(tokens * share + 1e-9))
        part = name.removeprefix("score_")
        even = torch.full(values.shape[:2], kept)
        adaptive = v[f"plain_adakv_kept_mask_{part}"].sum(-1)  # kvpress guarantees a share, `adaptive` mixes it in
        for counts, chooses, mask in (
            (even, selector, "kept_mask"),
            (adaptive, selector, "adakv_kept_mask"),
            (adaptive, TopK(), "plain_adakv_kept_mask"),
        ):
            found = chooses.select(SelectionRequest.of(view, scores, counts, norms))
            assert torch.equal(found, v[f"{mask}_{part}"]), mask
        combined = v[name]  # the largest number, or infinite, in the first stage
        second = combined < torch.finfo(torch.float32).max
        close(combined[second], ((scores + selector.epsilon) * norms)[second])
    assert v.unread() == []
