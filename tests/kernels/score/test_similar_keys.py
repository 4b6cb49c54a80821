"""Which look-alikes each key forgives, and how far the search for them goes."""

import pytest
import torch

from kvpolicy_kernels.score.redundancy.similar_keys import find_similar
from tests.kernels.references import redundancy as reference
from tests.kernels.score.similar_keys import KINDS, keys_of, place, threshold_for


@pytest.mark.parametrize("end", ["last", "first"])
@pytest.mark.parametrize("forgive", [1, 2, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_targets(kind, forgive, end):
    found = keys_of(kind, torch.tensor([[[140, 3]]]), 16, torch.bfloat16, seed=forgive)
    threshold = threshold_for(found, 0.45)
    result = find_similar(*place(found), threshold=threshold, limit=forgive, end=end)
    for row, keys in enumerate(found.lists("keys")):
        chosen = reference.targets(reference.similarities(keys.cpu().double()), threshold, forgive, end)
        padded = [columns + [-1] * (forgive - len(columns)) for columns in chosen]
        assert result.targets[row, : len(keys)].tolist() == padded


def test_the_search_ends_when_all_have_met_a_look_alike():
    lengths = torch.tensor([[[500]]])
    alike = find_similar(*place(keys_of("shared mean", lengths, 64, torch.bfloat16, 1)), threshold=0.3, limit=1)
    alone = find_similar(*place(keys_of("isotropic", lengths, 64, torch.bfloat16, 1)), threshold=0.9, limit=1)
    assert alike.compared.tolist() == [[256] * 8]
    assert alone.compared.tolist() == [[500] * 8]
    oldest = find_similar(
        *place(keys_of("shared mean", lengths, 64, torch.bfloat16, 1)), threshold=0.3, limit=1, end="first"
    )
    assert oldest.compared.tolist() == [[256] * 8]
