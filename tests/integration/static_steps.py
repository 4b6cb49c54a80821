"""Generations without fixed shapes and with them, side by side, and forwards by hand."""

import itertools

import pytest
import torch

from tests.support.alone import repeat
from tests.support.decisions import Decisions
from tests.support.models import generate
from tests.support.policies import held
from tests.support.rounding import ROUNDING

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
TOLERANCE = 5e-5


def both(policy, one, tokens, mask, rounding=ROUNDING, **options):
    """What generate gives without fixed shapes and with them, the reports, and the positions held in the end.

    The second one takes the decisions of the first one where rounding decides.
    """
    decisions, found = Decisions(rounding), []
    with policy.attach(one) as attachment, decisions.watched():
        free = generate(one, tokens, mask, past_key_values=(cache := attachment.cache()), **options)
        found.append((free, attachment.report(), held(cache)))
    with policy.attach(one, graph=True) as attachment, decisions.followed():
        cache = attachment.cache()
        fixed = repeat(free, slice(None), one, tokens, mask, rounding=rounding, past_key_values=cache, **options)
        found.append((fixed, attachment.report(), held(cache)))
    return zip(*found, strict=True)


def assert_alike(policy, one, tokens, mask, **options):
    _, reports, positions = both(policy, one, tokens, mask, **options)
    assert positions[0] == positions[1]
    for layer, other in zip(*(report.layers for report in reports), strict=True):
        assert (layer.seq_len, layer.held, layer.compressions, layer.decode_steps) == (
            other.seq_len,
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
