"""A shipped policy on a real model, against its oracle."""

import importlib.resources
from typing import Any

import torch
import yaml

import kvpolicy
from tests.models import build, model, prompt
from tests.oracles.simulation import Method, simulate
from tests.policies import held

SIZES = (24, *[1] * 9, 5, *[1] * 6)  # a prompt, decoding, another turn, decoding
CLEAR = 2e-5  # as a share of the largest score: a hundred times what rounding does to one
PROMPTS = 8


def shipped(name: str, budget: int, every: int, sinks: int, recent: int, **changed: Any) -> kvpolicy.Policy:
    """A shipped policy, as it stands in its file but for the budget, what is protected, and parameters by name."""
    text = importlib.resources.files("kvpolicy_policies").joinpath(f"{name}.yaml").read_text()
    parts = {key: _changed(value, changed) for key, value in yaml.safe_load(text).items()}
    parts["compress"] = {**parts["compress"], "every": every}
    parts |= {"budget": budget, "protect": {"sinks": sinks, "recent": recent}}
    given = {key: value for key, value in parts.items() if key not in ("kvpolicy", "name", "summary", "reference")}
    return kvpolicy.load(name, **given)


def _changed(part: Any, changed: dict[str, Any]) -> Any:
    if isinstance(part, dict):
        return {key: changed.get(key, _changed(value, changed)) for key, value in part.items()}
    return [_changed(each, changed) for each in part] if isinstance(part, list) else part


def assert_holds_what_the_oracle_holds(policy: kvpolicy.Policy, make: type[Method], *given: int, **options: Any) -> None:
    """After every forward, every layer, row and head; with a row of real tokens, and one that is padded."""
    sizes = options.pop("sizes", SIZES)
    length = sum(sizes)
    for seed in range(PROMPTS):
        tokens, mask = prompt(length, length - 9, seed=seed)
        method = make(*given, **options)
        expected = simulate(build(), method, tokens, mask, sizes)
        if method.margin > CLEAR:
            break
    else:
        raise AssertionError(f"none of {PROMPTS} prompts has decisions that rounding could not turn: {method.margin}")
    found = _held_after_each(policy, tokens, mask, sizes)
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert one == other, f"after forward {step} of {sizes[step]} tokens"
    assert rounds(expected) >= 3, "too few evictions to tell"


def _held_after_each(policy, tokens, mask, sizes):  # noqa: ANN001, ANN202
    found, start = [], 0
    with policy.attach(model()) as attachment, torch.no_grad():
        cache = attachment.cache()
        for size in sizes:
            end = start + size
            attachment.model(tokens[:, start:end], attention_mask=mask[:, :end], past_key_values=cache)
            found.append([[[_real(slots) for slots in heads] for heads in rows] for rows in held(cache)])
            start = end
    return found


def _real(slots: list[int]) -> list[int]:
    return [position for position in slots if position >= 0]


def rounds(expected) -> int:  # noqa: ANN001
    """Evictions of the first row and layer."""
    sets = [set(step[0][0][0]) for step in expected]
    return sum(not one <= other for one, other in zip(sets, sets[1:], strict=False)) + (len(sets[0]) < SIZES[0])
