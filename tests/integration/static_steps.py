"""Generations without fixed shapes and with them, side by side, and forwards by hand."""

import itertools

import pytest
import torch

from tests.models import difference, generate
from tests.policies import held

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
TOLERANCE = 5e-5


def both(policy, one, tokens, mask, **options):
    """What generate gives without fixed shapes and with them, the reports, and the positions held in the end."""
    found = []
    for graph in (False, True):
        with policy.attach(one, graph=graph) as attachment:
            output = generate(one, tokens, mask, past_key_values=(cache := attachment.cache()), **options)
            found.append((output, attachment.report(), held(cache)))
    return zip(*found, strict=True)


def assert_alike(policy, one, tokens, mask, **options):
    (free, fixed), reports, positions = both(policy, one, tokens, mask, **options)
    assert torch.equal(free.sequences, fixed.sequences)
    assert difference(free, fixed) <= TOLERANCE
    assert positions[0] == positions[1]
    for layer, other in zip(*(report.layers for report in reports), strict=True):
        assert (layer.seen, layer.held, layer.compressions, layer.decode_steps) == (
            other.seen,
            other.held,
            other.compressions,
            other.decode_steps,
        )
        assert layer.read == pytest.approx(other.read)


def fed(one, cache, tokens, *ends):
    """Logits [B, V] behind the last token of each forward; a forward ends at each of `ends`."""
    starts = (cache.get_seq_length(), *ends)
    with torch.no_grad():
        forwards = [one(tokens[:, start:end], past_key_values=cache) for start, end in itertools.pairwise(starts)]
    return [output.logits[:, -1] for output in forwards]
