"""How far the model writes the right answer under a policy, without computing the prompt anew for every policy."""

from collections.abc import Sequence

import attrs
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy.evaluate.table.trace import Batch, Traced, replay
from kvpolicy.integrations.transformers.attachment import Attachment
from kvpolicy.integrations.transformers.cache import PolicyCache
from kvpolicy.plan.plan import Plan


@attrs.frozen
class Answered:
    """How much of each target was written right, greedily."""

    before_mistake: tuple[float, ...]  # share of the words before the first wrong one
    whole: tuple[bool, ...]  # every word right, and nothing after them


@torch.inference_mode()
def answered(model: PreTrainedModel, plan: Plan, batch: Batch, traced: Sequence[Traced]) -> Answered:
    """Write every row's answer until each has made a mistake, the question and the answer token by token.

    The right words are fed whatever the model would write: up to the first mistake, which is all that counts, that is
    greedy decoding; a row that has made one changes nothing for the others.
    """
    with Attachment(plan, model) as attachment:
        cache = attachment.cache()
        replay(cache.managed, traced, batch.valid)
        right = _written(model, cache, batch)
    return Answered(
        before_mistake=tuple(min(n, words) / words for n, words in zip(right, batch.targets, strict=True)),
        whole=tuple(n > words for n, words in zip(right, batch.targets, strict=True)),
    )


def _written(model: PreTrainedModel, cache: PolicyCache, batch: Batch) -> list[int]:
    """Words right before the first mistake, the end counted as one."""
    wanted = torch.tensor(batch.targets) + 1
    right, going = torch.zeros_like(wanted), torch.ones_like(wanted, dtype=torch.bool)
    for step in range(batch.later.shape[1] - 1):
        logits = _step(model, cache, batch, step)
        word = step - batch.asked + 1
        if word < 0:
            continue
        going &= (logits.argmax(-1) == batch.later[:, step + 1]) & (right < wanted)
        right += going
        if not bool((going & (right < wanted)).any()):
            break
    found: list[int] = right.tolist()
    return found


def _step(model: PreTrainedModel, cache: PolicyCache, batch: Batch, step: int) -> Tensor:
    mask = torch.nn.functional.pad(batch.valid.long(), (0, step + 1), value=1)
    place = batch.valid.sum(1, keepdim=True) + step
    tokens = batch.later[:, step : step + 1]
    out = model(tokens, attention_mask=mask, position_ids=place, past_key_values=cache, use_cache=True)
    logits: Tensor = out.logits[:, -1]
    return logits
