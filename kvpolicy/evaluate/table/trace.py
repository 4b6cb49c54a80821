"""Queries, keys and values of the testbed model, caught once, so that many caches can be filled with them."""

from collections.abc import Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.answers import SEEN, is_seen, places_of
from kvpolicy.evaluate.testbed import Item
from kvpolicy.integrations.transformers.attachment import Attachment
from kvpolicy.integrations.transformers.cache_layer import PolicyLayer
from kvpolicy.integrations.transformers.calls.padding_mask import NewTokens
from kvpolicy.integrations.transformers.models.support import geometry_of
from kvpolicy.plan.plan import compile_policy
from kvpolicy.policy import load
from kvpolicy.stages import Needs


@attrs.frozen(eq=False)
class Batch:
    """Items of one task as tokens: a context, padded on the left, then a question and its answer, one by one."""

    task: str
    context: Tensor  # [B, T] ids
    valid: Tensor  # [B, T] bool, False = pad
    later: Tensor  # [B, S] ids: question, target, end; what follows the end in a row counts for nothing
    asked: int  # tokens of the question
    targets: tuple[int, ...]  # words of each target, the end not counted

    @property
    def tokens(self) -> int:
        """Real tokens of the shortest row when all but its last word are in the cache."""
        return int(self.valid.sum(1).min()) + self.asked + min(self.targets)


@attrs.frozen(eq=False)
class Traced:
    """One layer: queries [B, H, T, D], keys and values [B, K, T, D] post-RoPE."""

    queries: Tensor
    keys: Tensor
    values: Tensor
    scaling: float


def batch_of(tokenizer: PreTrainedTokenizerBase, items: Sequence[Item], question: str = SEEN) -> Batch:
    """Items of one task as one batch; where scorers may see the question it also stands behind the context.

    Raises EvaluationError unless their questions are of one length.
    """
    task = items[0].task
    seen = is_seen(task, question)
    contexts = _ids(tokenizer, [one.prompt if seen else one.context for one in items], "left", special=True)
    questions = _ids(tokenizer, [one.question for one in items], "right")
    if not questions["attention_mask"].all():
        raise EvaluationError("the questions of one batch must be of one length")
    targets = _ids(tokenizer, [f"{one.target} {tokenizer.eos_token}" for one in items], "right")
    return Batch(
        task=task,
        context=contexts["input_ids"],
        valid=contexts["attention_mask"].bool(),
        later=torch.cat([questions["input_ids"], targets["input_ids"]], 1),
        asked=questions["input_ids"].shape[1],
        targets=tuple((targets["attention_mask"].sum(1) - 1).tolist()),
    )


def _ids(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], side: str, *, special: bool = False) -> Any:
    return tokenizer(list(texts), padding=True, padding_side=side, add_special_tokens=special, return_tensors="pt")


@torch.inference_mode()
def catch(model: PreTrainedModel, tokens: Tensor, valid: Tensor) -> tuple[Traced, ...]:
    """What the attention of each layer sees, with everything kept, of tokens [B, T] of which `valid` are real."""
    plan = compile_policy(load("kvpolicy:full").spec, geometry_of(model.config), model.device, model.dtype)
    plan = attrs.evolve(plan, needs=Needs(queries=tokens.shape[1]), observers=())
    call: Any = {"attention_mask": valid.long(), "position_ids": places_of(valid), "logits_to_keep": 1}
    with Attachment(plan, model) as attachment:
        cache = attachment.cache()
        model(tokens, past_key_values=cache, use_cache=True, **call)
    return tuple(map(_traced, cache.managed))


def _traced(layer: PolicyLayer) -> Traced:
    queries, _ = layer.window.last(range(len(layer.num_tokens)))
    if queries is None:
        raise EvaluationError("a layer that saw no queries has nothing to replay")
    return Traced(queries, *layer.storage.all_states(), layer.scaling)


@torch.inference_mode()
def replay(layers: Sequence[PolicyLayer], traced: Sequence[Traced], valid: Tensor) -> None:
    """Fill new cache layers with the first tokens of a trace, as a prompt of [B, T] would.

    Attention over a prompt is always over all of it, so that its keys, values and queries are the same whatever the
    policy: only what a layer keeps of them differs. The attention itself is not computed again.
    """
    count = valid.shape[1]
    new_tokens = None if bool(valid.all()) else NewTokens(valid, valid[:, :0])
    for layer, one in zip(layers, traced, strict=True):
        layer.update(one.keys[:, :, :count], one.values[:, :, :count])
        positions = layer.place_tokens(new_tokens)
        layer.finish_forward(QueryBatch(one.queries[:, :, :count], positions, new_tokens is not None, one.scaling))
