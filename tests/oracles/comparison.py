"""A shipped policy on a real model, against its oracle."""

import importlib.resources
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import yaml

import kvpolicy
from kvpolicy.plan.calibration import Calibration
from kvpolicy.plan.plan import LOG_VOTES
from tests.oracles.simulation import Contents, Method, simulate
from tests.support import storage
from tests.support.models import build, model, prompt
from tests.support.policies import held

SIZES = (22, 2, *[1] * 8, 5, *[1] * 6)  # a prompt, a short turn, decoding, another turn, decoding
SHORT = (14, *[1] * 6, 2)  # so that few tokens occur twice: their keys differ in the first layer by rotation alone
TURN = sum(SIZES[:10])  # where the other turn begins; that of the second row is padded, too
CLEAR = 2e-5  # as a share of the largest score: a hundred times what rounding does to one
PROMPTS = 8


def shipped(name: str, budget: int, every: int, sinks: int, recent: int, **changed: Any) -> kvpolicy.Policy:
    """A shipped policy, as it stands in its file but for the budget, what is protected, and parameters by name."""
    text = importlib.resources.files("kvpolicy_policies").joinpath(f"{name}.yaml").read_text()
    parts = _changed(yaml.safe_load(text), changed)
    parts["compress"] = {**parts["compress"], "every": every}
    parts |= {"budget": budget, "protect": {**parts["protect"], "sinks": sinks, "recent": recent}}
    given = {key: value for key, value in parts.items() if key not in ("kvpolicy", "name", "summary", "reference")}
    return kvpolicy.load(name, **given)


def _changed(part: Any, changed: dict[str, Any]) -> Any:
    if isinstance(part, dict):
        return {key: changed.get(key, _changed(value, changed)) for key, value in part.items()}
    return [_changed(each, changed) for each in part] if isinstance(part, list) else part


def assert_holds_what_the_oracle_holds(
    policy: kvpolicy.Policy,
    make: Callable[..., Method],
    *given: int,
    changes: bool = False,
    sizes: tuple[int, ...] = SIZES,
    calibration: Calibration | None = None,
    regions: dict[str, Any] | None = None,
) -> None:
    """After every forward, every layer, row and head; with a row of real tokens, and one that is padded in both turns.

    `changes`: the policy merges or packs. What its entries have become is then taken from the cache; who is held, and
    what that is worth, is not.
    """
    length = sum(sizes)
    for seed in range(PROMPTS):
        tokens, mask = prompt(length, length - 9, seed=seed)
        mask[1, TURN : TURN + 2] = 0
        found, contents = _run(policy, tokens, mask, sizes, calibration, regions)
        method = make(*given)
        expected = simulate(build(), method, tokens, mask, sizes, contents if changes else None)
        if method.margin > CLEAR:
            break
    else:
        raise AssertionError(f"none of {PROMPTS} prompts has decisions that rounding could not turn: {method.margin}")
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one == other, f"after forward {step}, of {sizes[step]} tokens"
    assert _rounds(expected, sizes) >= 4, "too few evictions to tell"


def _run(
    policy: kvpolicy.Policy,
    tokens: Any,
    mask: Any,
    sizes: tuple[int, ...],
    calibration: Calibration | None,
    regions: dict[str, Any] | None,
) -> tuple[list[Any], list[Contents]]:
    found: list[Any] = []
    contents: list[Contents] = []
    start = 0
    with policy.attach(model(), calibration=calibration) as attachment, torch.no_grad():
        cache = attachment.cache(regions=regions)
        for size in sizes:
            end = start + size
            attachment.model(tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
            found.append([[[_real(slots) for slots in heads] for heads in rows] for rows in held(cache)])
            contents.append(_contents(cache, len(mask)))
            start = end
    return found, contents


def _real(slots: list[int]) -> list[int]:
    return [position for position in slots if position >= 0]


def _contents(cache: Any, rows: int) -> Contents:
    heads = range(cache.plan.geometry.kv_heads)
    return {
        (layer.stats.layer, row): [_of_head(layer.storage, row, head) for head in heads]
        for layer in cache.managed
        for row in range(rows)
    }


def _of_head(entries: Any, row: int, head: int) -> dict[int, tuple[np.ndarray, np.ndarray, float]]:
    positions, keys, values = (storage.segment(entries, name, row, head) for name in ("positions", "keys", "values"))
    votes = torch.zeros(len(positions))
    if LOG_VOTES in entries.slots.columns:
        votes = storage.segment(entries, LOG_VOTES, row, head)
    columns = (positions.tolist(), keys.double().numpy(), values.double().numpy(), votes.double().exp().tolist())
    return {position: tuple(rest) for position, *rest in zip(*columns, strict=True)}  # type: ignore[misc]


def _rounds(expected: list[Any], sizes: tuple[int, ...]) -> int:
    """Forwards after which the first head of the first row and layer holds less than before."""
    counts = [len(step[0][0][0]) for step in expected]
    before = [0, *counts]
    return sum(old + new > now for old, new, now in zip(before, sizes, counts, strict=False))
