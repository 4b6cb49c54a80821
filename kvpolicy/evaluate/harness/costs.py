"""What a cache of ours costs, measured as it is of other libraries: in forwards of its own over one prompt."""

import statistics
import time
from collections.abc import Callable
from typing import Any, Final

import torch
from transformers import DynamicCache
from transformers.cache_utils import Cache

from kvpolicy.evaluate.harness.measure import GroupRun, bytes_of_a_row
from kvpolicy.evaluate.harness.measured import Costs, Measured
from kvpolicy.integrations.transformers.attachment import Attachment
from kvpolicy.integrations.transformers.cache import PolicyCache
from kvpolicy.plan.plan import Plan

TIMED_STEPS: Final = 16  # decode steps


def costs_of_full(run: GroupRun) -> Costs:
    """Of transformers' own full cache, while nothing is attached to the model."""
    prefill, step = _seconds(run, DynamicCache(config=run.model.config), lambda: None)
    return Costs(1.0, 1.0, prefill, step)


def costs_under(run: GroupRun, plan: Plan, attachment: Attachment, measured: Measured) -> Costs:
    """Of a plan that has been measured, while any policy is attached to the model."""
    cache = attachment.adopt(PolicyCache(plan, run.model.config))
    held: list[float] = []
    prefill, step = _seconds(run, cache, lambda: held.append(bytes_of_a_row(cache)))
    share = held[0] / run.full_bytes_of(run.prompt_tokens)
    return Costs(share, measured.held_bytes / measured.full_bytes, prefill, step)


@torch.inference_mode()
def _seconds(run: GroupRun, cache: Cache, after_prompt: Callable[[], None]) -> tuple[float, float]:
    """Seconds of the forward over the longest prompt with a new cache, and of a decode step behind it, median."""
    model: Any = run.model
    prompt = torch.tensor([max((case.prompt for case in run.cases), key=len)], device=model.device)
    started = _now(model)
    logits = model(prompt, past_key_values=cache, use_cache=True, logits_to_keep=1).logits
    prefill = _now(model) - started
    after_prompt()
    steps = []
    for step in range(TIMED_STEPS):
        token = logits[:, -1:].argmax(-1)
        place = torch.full_like(token, prompt.shape[1] + step)
        started = _now(model)
        logits = model(token, position_ids=place, past_key_values=cache, use_cache=True).logits
        steps.append(_now(model) - started)
    return prefill, statistics.median(steps)


def _now(model: Any) -> float:
    if model.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()
