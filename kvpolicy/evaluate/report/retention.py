"""Which tokens of a prompt each layer still holds after an answer."""

from collections.abc import Sequence
from fractions import Fraction
from itertools import count

import attrs
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpolicy.errors import KVPolicyError
from kvpolicy.evaluate.fitting.fit import fit_calibrated
from kvpolicy.evaluate.harness.calibrations import Calibrations
from kvpolicy.evaluate.harness.measure import GroupRun
from kvpolicy.evaluate.tasks.case import Sources
from kvpolicy.evaluate.tasks.generated import Generated
from kvpolicy.evaluate.testbed import Item, make_item
from kvpolicy.integrations.transformers.attachment import Attachment
from kvpolicy.integrations.transformers.cache import PolicyCache
from kvpolicy.policy import Policy

TASK, LENGTH = "recall", 128
_CLAUSE_END = "."
_FACTS = ("note", "set", "value", "link")


@attrs.frozen(eq=False)
class Retention:
    """What one policy kept of one item."""

    policy: Policy  # as it was fitted
    share: Fraction
    right: bool
    text: str  # what was written
    held: Tensor  # [L, T] float32: the fraction of KV heads that hold the token


@attrs.frozen(eq=False)
class Kept:
    """One item, and what several policies kept of it."""

    item: Item
    tokens: tuple[str, ...]  # of the prompt, T of them
    matter: tuple[bool, ...]  # those that the answer follows from
    by_policy: tuple[Retention, ...]


def retention(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    policies: Sequence[Policy],
    calibrations: Calibrations,
    *,
    share: Fraction,
    seed: int = 0,
) -> Kept:
    """Answer one short item of the embedded model under each policy; what is left of its prompt after the answer.

    The item is the first of the seed whose answer stands in the first half, where a recent window has lost it.
    Policies that do not go with the model, or cannot be fitted to so short a prompt, are left out.
    """
    items = (make_item(TASK, seed, index, LENGTH) for index in count())
    item, tokens = next((one, words) for one in items if _stands_early(one, words := _tokens(tokenizer, one)))
    case = Generated(TASK, "").case(Sources(tokenizer, ()), item)
    run, kept = GroupRun(model, tokenizer, [case], step=1), []
    for policy in policies:
        try:
            fitted = fit_calibrated(policy, model, share=share, length=case.tokens, calibrate=calibrations.of)
            plan = fitted.compile(model, calibration=calibrations.of(fitted))
        except KVPolicyError:
            continue
        with Attachment(plan, model) as attachment:
            measured, caches = run.caches_under(plan, attachment)
        held = held_tokens(caches[0], len(tokens))
        kept.append(Retention(fitted, share, measured.values["correct"] == [1.0], measured.texts[0], held))
    return Kept(item, tokens, tokens_that_matter(item, tokens), tuple(kept))


def _tokens(tokenizer: PreTrainedTokenizerBase, item: Item) -> tuple[str, ...]:
    return tuple(tokenizer.convert_ids_to_tokens(tokenizer(item.prompt)["input_ids"]))


def _stands_early(item: Item, tokens: tuple[str, ...]) -> bool:
    """Whether all that matters, apart from the question, is in the first half."""
    context = tokens_that_matter(item, tokens)[: -len(item.question.split())]
    return any(context) and not any(context[len(tokens) // 2 :])


def held_tokens(cache: PolicyCache, length: int) -> Tensor:
    """[L, T] float32: for each of the first `length` tokens of row 0, the fraction of KV heads that hold it."""
    held = torch.zeros(len(cache.managed), length, dtype=torch.float32)
    for layer, row in zip(cache.managed, held, strict=True):
        heads = layer.storage.heads
        for head in range(heads):
            positions = layer.storage.positions(0, head).cpu().long()
            row[positions[(positions >= 0) & (positions < length)]] += 1 / heads
    return held


def tokens_that_matter(item: Item, tokens: tuple[str, ...]) -> tuple[bool, ...]:
    """Marks the question, and each fact whose name (its second word) stands in the question or the target."""
    named = {*item.question.split(), *item.target.split()}
    question = len(tokens) - len(item.question.split())
    marked, start = [False] * len(tokens), 1
    for place in range(1, question):
        if tokens[place] == _CLAUSE_END:
            matters = place - start == 3 and tokens[start] in _FACTS and tokens[start + 1] in named
            marked[start : place + 1] = [matters] * (place + 1 - start)
            start = place + 1
    marked[question:] = [True] * (len(tokens) - question)
    return tuple(marked)
