"""One batch of questions under one policy: what was written, what it took."""

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.meter import Meter, held_bytes, window_bytes
from kvpolicy.evaluate.testbed import Item
from kvpolicy.plan.calibration import Calibration
from kvpolicy.policy import Policy


@attrs.frozen
class Answers:
    """What a batch of B items gave. Bytes are for the whole batch."""

    texts: tuple[str, ...]
    prompt_tokens: int  # pads excluded
    new_tokens: int  # computed in all rows: a row that is done goes on until the last one is
    prompt_seconds: float
    decode_seconds: float  # after the first new token
    held_bytes: int  # storage of the entries at the end
    peak_bytes: int  # the most at any time, with the layer that is being compressed at full size
    window_bytes: int  # queries observed for the scorers


UNSEEN, SEEN = "unseen", "seen"
QUESTION_MODES = (SEEN, UNSEEN)
_STARTS_A_TRACE = "reasoning"  # its question names the first step; asked twice, the model begins twice


@torch.inference_mode()
def answer(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    items: Sequence[Item],
    policy: Policy | None,
    question: str = SEEN,
    calibration: Calibration | None = None,
) -> tuple[Answers, Cache]:
    """Generate greedily for all items at once, left-padded; None stands for the full cache of transformers.

    The context goes in first, and is compressed; only then is the question asked, so that no word of the answer comes
    from the attention of the prompt itself, which is always whole. When the question is seen (see `is_seen`) it also
    stands behind the context, so that scorers know what will be asked. Also returns the cache as it was left.
    """
    if policy is None:
        return _generate(model, tokenizer, items, question, DynamicCache(config=model.config))
    with policy.attach(model, calibration=calibration) as attachment:
        return _generate(model, tokenizer, items, question, attachment.cache())


def is_seen(task: str, question: str) -> bool:
    """Whether scorers see the question of a task while they compress the context; never that of `reasoning`."""
    return question == SEEN and task != _STARTS_A_TRACE


def total_tokens(tokenizer: PreTrainedTokenizerBase, item: Item, question: str = SEEN) -> int:
    """Tokens that a full cache holds when the item has been answered: the last one written is never cached."""
    first, second = _parts(item, question)
    return len(_ids(tokenizer, [first])["input_ids"][0]) + len(second.split()) + item.new_tokens - 1


def _parts(item: Item, question: str) -> tuple[str, str]:
    """What is compressed, and what is asked of it."""
    return (item.prompt if is_seen(item.task, question) else item.context), item.question


def _generate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], question: str, cache: Cache
) -> tuple[Answers, Cache]:
    first, second = zip(*(_parts(item, question) for item in items), strict=True)
    contexts = _ids(tokenizer, first).to(model.device)
    questions = _ids(tokenizer, second, add_special_tokens=False).to(model.device)
    if not questions["attention_mask"].all():
        raise EvaluationError("the questions of one batch must be of one length")
    both = {name: torch.cat([contexts[name], questions[name]], 1) for name in ("input_ids", "attention_mask")}
    generate: Any = model.generate
    with Meter(model, cache, prompt_forwards=2) as meter:
        places = places_of(contexts["attention_mask"])  # pads not counted: `generate` goes on from there
        model(**contexts, position_ids=places, past_key_values=cache, use_cache=True, logits_to_keep=1)
        limit = max(item.new_tokens for item in items)
        written = generate(**both, past_key_values=cache, max_new_tokens=limit, do_sample=False)
    written = written[:, both["input_ids"].shape[1] :]
    answers = Answers(
        texts=tuple(tokenizer.batch_decode(written, skip_special_tokens=True)),
        prompt_tokens=int(both["attention_mask"].sum()),
        new_tokens=written.numel(),
        prompt_seconds=meter.prompt_seconds,
        decode_seconds=meter.decode_seconds,
        held_bytes=held_bytes(cache),
        peak_bytes=meter.peak_bytes,
        window_bytes=window_bytes(cache),
    )
    return answers, cache


def places_of(valid: Tensor) -> Tensor:
    """Where each token [B, T] stands among its row's real ones; 0 for pads on the left."""
    return (valid.long().cumsum(1) - 1).clamp(min=0)


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], **options: Any) -> Any:
    return tokenizer(list(texts), padding=True, padding_side="left", return_tensors="pt", **options)
