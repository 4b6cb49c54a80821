"""What static shapes can serve: asked before a model is changed."""

from collections.abc import Iterator, Sequence

import torch
from transformers import PretrainedConfig, PreTrainedModel

from kvpolicy.errors import PolicyError, Problem, UnsupportedModelError
from kvpolicy.plan.plan import Plan
from kvpolicy.spec.policy import NEVER

_HORIZON = 2**40  # tokens; no sequence is longer


def require_static(plan: Plan, model: PreTrainedModel) -> None:
    """Raise PolicyError or UnsupportedModelError with every reason why decode steps cannot have fixed shapes."""
    problems = list(_problems(plan))
    if problems:
        raise PolicyError(problems)
    if len(plan.geometry.managed) < _layers(model.config):
        raise UnsupportedModelError("graph: every layer must have full attention; some have a sliding window")
    devices = {parameter.device for parameter in model.parameters()}
    if len(devices) > 1:
        raise UnsupportedModelError(f"graph: the model must be on one device: {', '.join(sorted(map(str, devices)))}")


def capacities(plan: Plan, shortest: int) -> tuple[int, ...]:
    """Slots per KV head that each layer needs for rows of at least `shortest` tokens, however long they get."""
    average = plan.budgets.average(shortest)
    most = plan.budgets.per_layer(shortest)
    seen = max(shortest, average)
    while seen < _HORIZON:
        most = tuple(map(max, most, plan.budgets.per_layer(seen)))
        seen *= 2
    return tuple(budget + plan.budgets.slack for budget in most)


def fit(held: Sequence[int], needed: Sequence[int]) -> bool:
    """Whether each of the capacities `held` is at least what is needed."""
    return all(has >= wants for has, wants in zip(held, needed, strict=True))


def _of_the_request(plan: Plan) -> Iterator[Problem]:
    if plan.spec.protect.by_place:
        yield Problem("protect", "graph: only first and last tokens can be protected, no prompt and no regions")
    if plan.needs.regions:
        yield Problem("score", f"graph: no regions can be read: {', '.join(plan.needs.regions)}")


def _problems(plan: Plan) -> Iterator[Problem]:
    spec = plan.spec
    if spec.compress.every == NEVER:
        yield Problem("compress.every", "graph: must be a number: otherwise the cache grows with every token")
    if spec.budget.grows:
        yield Problem("budget", f"graph: must not grow with the tokens: {spec.budget}")
    yield from _of_the_request(plan)
    if plan.compresses_jointly:
        yield Problem("allocate.joint", f"graph: layers must not compete: {spec.allocate.divider.name}")
    elif plan.ragged:
        yield Problem("allocate.heads", f"graph: heads must hold equally many entries: {spec.allocate.heads.name}")
    for observer in plan.chunk_observers:
        yield Problem("score", f"graph: no scorer can be shown chunks of tokens: {observer.scorer.name}")
    if any(forms.keys.columns or forms.values.columns for forms in plan.formats):
        yield Problem("store", f"graph: entries must be held as they are: {spec.store.name}")
    if plan.selective or any(page is not None for page in plan.page_formats):
        yield Problem("read", f"graph: all held entries must be read: {spec.read.name}")
    if spec.merge.votes or not spec.merge.moves_only:
        yield Problem("merge", f"graph: kept entries must stay as they are: {spec.merge.name}")


def _layers(config: PretrainedConfig) -> int:
    return int(config.get_text_config(decoder=True).num_hidden_layers)


def fingerprint(model: PreTrainedModel) -> tuple[tuple[int, torch.dtype], ...]:
    """Where the weights are: a captured step reads them there."""
    return tuple((weights.data_ptr(), weights.dtype) for weights in model.parameters())
