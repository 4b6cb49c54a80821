"""How far a policy moves the output of attention, on cached tensors of the testbed model, against float64."""

from collections.abc import Sequence
from statistics import mean

import attrs
import torch
from torch import Tensor

from kvpolicy.attention.attend import attend
from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.evaluate.table.trace import Batch, Traced, replay
from kvpolicy.integrations.transformers.cache_layer import PolicyLayer
from kvpolicy.plan.plan import Plan


@attrs.frozen(eq=False)
class Reference:
    """One batch: what every layer saw of all its tokens, and what exact attention gives for the newest of them."""

    task: str
    valid: Tensor  # [B, P] bool, of the prompt: all tokens but the newest
    traced: tuple[Traced, ...]
    exact: tuple[Tensor, ...]  # by layer, [B, H, steps, D] float64

    @property
    def steps(self) -> int:
        """Newest tokens, which are decoded one by one."""
        return self.exact[0].shape[2]


@attrs.frozen
class AttentionError:
    """‖o - o*‖ / ‖o*‖ of a query head at a decode step, mean over rows, heads and steps."""

    by_layer: tuple[float, ...]
    read: float = 1.0  # entries that a step attended to, as a share of those held, mean over layers

    @property
    def mean(self) -> float:
        """Over the layers."""
        return mean(self.by_layer)

    @property
    def worst(self) -> float:
        """Of the layer with the largest."""
        return max(self.by_layer)


def tokens_of(batch: Batch) -> tuple[Tensor, Tensor]:
    """Ids and validity [B, T + S] of contexts with their questions and answers, up to the shortest target's end."""
    later = batch.later[:, : batch.asked + min(batch.targets)]
    return torch.cat([batch.context, later], 1), torch.nn.functional.pad(batch.valid, (0, later.shape[1]), value=True)


def reference_of(batch: Batch, traced: tuple[Traced, ...], valid: Tensor, most_steps: int) -> Reference:
    """Exact attention of the newest queries: those of question and answer, at most `most_steps` of them."""
    steps = min(most_steps, batch.asked + min(batch.targets))
    exact = tuple(exact_attention(one, valid, steps) for one in traced)
    return Reference(batch.task, valid[:, : valid.shape[1] - steps], traced, exact)


def exact_attention(traced: Traced, valid: Tensor, steps: int) -> Tensor:
    """Softmax attention [B, H, steps, D] of the newest queries over all keys up to their own, in float64."""
    heads, length = traced.keys.shape[1], traced.keys.shape[2]
    queries = traced.queries[:, :, length - steps :].double().unflatten(1, (heads, -1))
    logits = queries @ traced.keys.double()[:, :, None].transpose(-1, -2) * traced.scaling
    slots = torch.arange(length, device=logits.device)
    later = slots > slots[length - steps :, None]
    hidden = later | ~valid[:, None, None, None]
    exact: Tensor = logits.masked_fill(hidden, -torch.inf).softmax(-1) @ traced.values.double()[:, :, None]
    return exact.flatten(1, 2)


def filled(plan: Plan, reference: Reference) -> list[PolicyLayer]:
    """New cache layers for all managed layers of a plan, which have seen the prompt."""
    layers = [PolicyLayer(plan, ordinal) for ordinal in range(plan.geometry.layers)]
    replay(layers, reference.traced, reference.valid)
    return layers


@torch.inference_mode()
def attention_error(layers: Sequence[PolicyLayer], reference: Reference) -> AttentionError:
    """Decode the newest tokens in layers that have seen the prompt; the queries are those of the full cache.

    So every layer is judged by itself: no error of one reaches the next.
    """
    by_layer = tuple(_decoded(layer, ordinal, reference) for ordinal, layer in enumerate(layers))
    return AttentionError(by_layer, mean(_read_share(layer) for layer in layers))


def _decoded(layer: PolicyLayer, ordinal: int, reference: Reference) -> float:
    traced, exact = reference.traced[ordinal], reference.exact[ordinal]
    first = reference.valid.shape[1]
    outputs = [_step(layer, traced, first + step) for step in range(reference.steps)]
    away = (torch.cat(outputs, 2).double() - exact).norm(dim=-1) / exact.norm(dim=-1)
    return float(away.mean())


def _read_share(layer: PolicyLayer) -> float:
    if not layer.plan.selective:
        return 1.0
    return min(1.0, layer.stats.read / max(1.0, layer.stats.held))  # an eviction may have come after the last step


def _step(layer: PolicyLayer, traced: Traced, place: int) -> Tensor:
    now = slice(place, place + 1)
    layer.update(traced.keys[:, :, now], traced.values[:, :, now])
    asked = QueryBatch(traced.queries[:, :, now], layer.place_tokens(None), padded=False, scaling=traced.scaling)
    output = layer.attend(asked)
    if output is None:  # nothing is packed or evicted yet: what the model's own attention function would be left to do
        output = attend(layer.storage, asked, pads=layer.padded)
    layer.finish_forward(asked)
    return output
