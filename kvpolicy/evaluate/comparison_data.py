"""A comparison as plain data: everything that is needed to judge it, or to run it again."""

from collections.abc import Sequence
from typing import Any

from kvpolicy.evaluate.answers import is_seen
from kvpolicy.evaluate.compare import Outcome
from kvpolicy.evaluate.environment import machine, versions
from kvpolicy.evaluate.retention import Kept
from kvpolicy.evaluate.setup import Setup


def comparison_data(setup: Setup, outcomes: Sequence[Outcome], kept: Kept | None = None) -> dict[str, Any]:
    """The comparison as JSON-ready data."""
    return {
        "versions": versions(),
        "machine": machine(),
        "setup": {
            "model": "testbed",
            "seed": setup.seed,
            "items_per_task": setup.items,
            "tokens_per_item": setup.length,
            "rows_per_batch": setup.rows,
            "shares": [float(share) for share in setup.shares],
            "question": setup.question,
            "decoding": "greedy",
        },
        "outcomes": [_outcome(one, setup.question) for one in outcomes],
        **({} if kept is None else {"retention": _kept(kept)}),
    }


def _outcome(one: Outcome, question: str) -> dict[str, Any]:
    policy = one.policy
    return {
        "label": one.contender.label,
        "policy": one.contender.name,
        "share": float(one.contender.share),
        "task": one.task,
        "question_visible_to_scorers": is_seen(one.task, question),
        "digest": None if policy is None else policy.digest,
        "fitted_policy": None if policy is None else policy.to_yaml(),
        "items": one.items,
        "whole_answers_right": one.whole,
        "last_words_right": one.last_word,
        "accuracy": one.accuracy,
        "share_before_first_mistake": one.before_mistake,
        "held_bytes": one.held_bytes,
        "peak_bytes": one.peak_bytes,
        "window_bytes": one.window_bytes,
        "full_bytes": one.full_bytes,
        "held_share": one.held_share,
        "decode_tokens_per_second": one.decode_speed,
        "prompt_tokens_per_second": one.prompt_speed,
    }


def _kept(kept: Kept) -> dict[str, Any]:
    return {
        "task": kept.item.task,
        "tokens": list(kept.tokens),
        "matter": list(kept.matter),
        "target": kept.item.target,
        "policies": [
            {
                "policy": one.policy.name,
                "digest": one.policy.digest,
                "share": float(one.share),
                "written": one.text,
                "right": one.right,
                "held": [[round(part, 4) for part in row] for row in one.held.tolist()],
            }
            for one in kept.by_policy
        ],
    }
