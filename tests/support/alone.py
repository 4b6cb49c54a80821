"""Generations of different shapes compared step by step: rows of a batch with those rows alone, and whole batches."""

import torch
from transformers import LogitsProcessor, LogitsProcessorList

from tests.support.decisions import Decisions
from tests.support.models import generate
from tests.support.policies import held
from tests.support.rounding import ROUNDING, close


class SameTokens(LogitsProcessor):
    """Lets a greedy generation go on with the tokens [B, n] of another one, which must be its own up to rounding."""

    def __init__(self, tokens, rounding=ROUNDING):
        self.left, self.rounding = list(tokens.unbind(1)), rounding

    def __call__(self, _tokens, logits):
        token = self.left.pop(0)[:, None]
        best, given = logits.amax(-1, keepdim=True), logits.gather(-1, token)
        assert (best - given <= 2 * self.rounding * logits.abs().max()).all(), "another token, by more than rounding"
        return torch.full_like(logits, -torch.inf).scatter(-1, token, 0.0)


def repeat(expected, rows, one, tokens, mask=None, *, count=24, rounding=ROUNDING, **options):
    """A generation that takes the tokens of some rows of another one; asserts that the logits of all steps agree."""
    given = LogitsProcessorList([SameTokens(expected.sequences[rows, -count:], rounding)])
    found = generate(one, tokens, mask, count=count, logits_processor=given, **options)
    assert torch.equal(found.sequences[:, -count:], expected.sequences[rows, -count:])
    for own, theirs in zip(found.logits, expected.logits, strict=True):
        assert close(own, theirs[rows], rounding), (own - theirs[rows]).abs().max() / theirs[rows].abs().max()
    return found


def assert_rows_alone(one, attachment, tokens, mask, count=24):
    """Every row of a padded batch gives what it gives alone: the logits of all steps, and the entries held then."""
    decisions, cache = Decisions(), attachment.cache()
    with decisions.watched():
        batch = generate(one, tokens, mask, count=count, past_key_values=cache)
    assert all(logits.isfinite().all() for logits in batch.logits)
    for row, length in enumerate(mask.sum(1).tolist()):
        own = attachment.cache()
        with decisions.followed():
            repeat(batch, [row], one, tokens[row : row + 1, -length:], count=count, past_key_values=own)
        assert [rows[0] for rows in held(own)] == [rows[row] for rows in held(cache)]
    return decisions


def assert_greedy(one, sequences, start):
    """Every token from `start` on is the model's most likely one, or as likely as that up to rounding."""
    with torch.no_grad():
        logits = one(sequences[:, :-1], use_cache=False).logits[:, start - 1 :]
    given = logits.gather(-1, sequences[:, start:, None])[..., 0]
    assert (logits.amax(-1) - given <= 2 * ROUNDING * logits.abs().max()).all()
