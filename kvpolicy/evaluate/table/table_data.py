"""The evaluation as plain data: every number, and what is needed to judge it or to run it again."""

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

import attrs
from transformers import PreTrainedModel

from kvpolicy.evaluate.answers import SEEN, is_seen
from kvpolicy.evaluate.environment import machine, versions
from kvpolicy.evaluate.table.lines import Kind, Line
from kvpolicy.evaluate.table.measure import Measured
from kvpolicy.evaluate.table.setup import DecodeSetup, TableSetup
from kvpolicy.evaluate.table.speed import StepTime

FORM = 1  # of the record


def head(setup: TableSetup, model: PreTrainedModel, *, length: int, seconds: float) -> dict[str, Any]:
    """Where the numbers come from."""
    return {
        "form": FORM,
        "date": datetime.now(UTC).date().isoformat(),
        "versions": versions(),
        "machine": machine(),
        "seconds": round(seconds),
        "setup": {
            "model": "testbed",
            "parameters": model.num_parameters(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "seed": setup.seed,
            "tasks": {task: {"question_visible_to_scorers": is_seen(task, SEEN)} for task in setup.tasks},
            "items_per_task": setup.items,
            "tokens_per_item": setup.length,
            "tokens_of_the_shortest_item": length,
            "rows_per_batch": setup.rows,
            "shares": [float(share) for share in setup.shares],
            "error_items_per_task": setup.error_items,
            "error_steps": setup.error_steps,
            "calibration_sequences": setup.calibration[0],
            "calibration_tokens": setup.calibration[1],
            "decode": _decode_setup(setup.decode),
        },
    }


def line_record(line: Line, measured: Mapping[str, Measured], length: int) -> dict[str, Any]:
    """One line of the table, or of the comparison of mergers."""
    merge = {"merge": line.merge} if line.merge else {}
    about = {"policy": line.name, **merge, "kind": line.kind.value, "share": float(line.share)}
    if line.policy is None:
        return {**about, "refusal": line.refusal}
    found = measured[line.policy.digest]
    return {
        **about,
        "digest": line.policy.digest,
        "fitted_policy": line.policy.to_yaml(),
        **_bytes(found, line.kind, length),
        "read_share": found.read,
        "tasks": {task: _task(found, task) for task in found.answers},
        "attention_error": {
            "mean": found.mean_error,
            "worst_layer": found.worst_error,
            "by_task": {task: list(one.by_layer) for task, one in found.errors.items()},
        },
    }


def decode_record(name: str, digest: str, length: int, found: StepTime) -> dict[str, Any]:
    """One policy at one length."""
    return {
        "policy": name,
        "digest": digest,
        "length": length,
        "full_ms": found.full,
        "step_ms": found.step,
        "compression_ms": found.compression,
        "entries_held": found.held,
        "ratio": found.ratio,
    }


def refused(name: str, length: int, reason: str) -> dict[str, Any]:
    """A policy that the timed model cannot carry."""
    return {"policy": name, "length": length, "refusal": reason}


def _bytes(found: Measured, kind: Kind, length: int) -> dict[str, Any]:
    """Those that evict are held against the tokens seen, the others against as many entries as they hold."""
    storage = found.storage
    full = storage.full if kind is not Kind.BUDGET else storage.full_per_entry * storage.segments * length
    return {
        "bytes_per_entry": storage.per_entry,
        "bytes_per_entry_by_formula": storage.formula_per_entry,
        "bytes_per_entry_of_a_full_cache": storage.full_per_entry,
        "entries": storage.slots,
        "held_bytes": storage.measured,
        "held_share": storage.measured / full,
    }


def _task(found: Measured, task: str) -> dict[str, Any]:
    items = sum(len(one.whole) for one in found.answers[task])
    return {
        "items": items,
        "whole_answers_right": found.whole(task),
        "accuracy": found.whole(task) / items,
        "share_before_first_mistake": found.before_mistake(task),
    }


def _decode_setup(setup: DecodeSetup) -> dict[str, Any]:
    plain: Sequence[str] = ("pairs", "hidden", "layers", "heads", "kv_heads")
    return {
        "dtype": "float32",
        "lengths": list(setup.lengths),
        "share": float(setup.share),
        **{name: value for name, value in attrs.asdict(setup).items() if name in plain},
    }
