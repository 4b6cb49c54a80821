"""The whole evaluation, from policies to a record."""

import time
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpolicy.errors import KVPolicyError
from kvpolicy.evaluate.calibrations import Calibrations
from kvpolicy.evaluate.fit import fit_tokens
from kvpolicy.evaluate.table.lines import distinct, main_lines, merge_lines
from kvpolicy.evaluate.table.measure import Bench
from kvpolicy.evaluate.table.setup import TableSetup
from kvpolicy.evaluate.table.speed import DecodeBench, decode_model
from kvpolicy.evaluate.table.table_data import decode_record, head, line_record, refused
from kvpolicy.policy import Policy

DTYPE = torch.bfloat16  # bytes are compared with those of a 16-bit cache
MOST_EVERY = 128  # tokens between two compressions where time is measured: as shipped


class Watcher(Protocol):
    """Is told what comes, and when a step of it is done."""

    def begin(self, what: str, steps: int) -> Callable[[str], None]:
        """A part of so many steps; returns what to call after each."""


def evaluate(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setup: TableSetup, watcher: Watcher
) -> dict[str, Any]:
    """Measure everything on a testbed model; the time of decode steps on one with random weights."""
    started = time.perf_counter()
    calibrations = Calibrations(model, *setup.calibration)
    bench = Bench(model, tokenizer, setup, calibrations)
    length = bench.length
    done = watcher.begin("fitting policies", 1)
    lines = main_lines(setup, model, length, calibrations)
    mergers = merge_lines(setup, model, length, calibrations)
    policies = tuple(distinct((*lines, *mergers)))
    done("fitted")
    measured = bench.measure(policies, watcher.begin("answers and attention", bench.steps(len(policies))))
    steps = watcher.begin("decode steps", len(setup.policies) * len(setup.decode.lengths))
    decode = list(_decode(setup, steps))
    return {
        **head(setup, model, length=length, seconds=time.perf_counter() - started),
        "policies": [line_record(one, measured, length) for one in lines],
        "mergers": [line_record(one, measured, length) for one in mergers],
        "decode": decode,
    }


def _decode(setup: TableSetup, progress: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    model = decode_model(setup.decode)
    calibrations = Calibrations(
        model, *(min(most, size) for most, size in zip((2, 512), setup.calibration, strict=True))
    )
    bench = DecodeBench(model, setup.decode.pairs)
    for length in setup.decode.lengths:
        for policy in setup.policies:
            yield _timed(policy, length, setup, bench, calibrations)
            progress(f"{length} tokens, {policy.name}")


def _timed(
    policy: Policy, length: int, setup: TableSetup, bench: DecodeBench, calibrations: Calibrations
) -> dict[str, Any]:
    try:
        fitted = fit_tokens(policy, bench.model, length=length, share=setup.decode.share, most_every=MOST_EVERY)
        plan = calibrations.plan(fitted)
    except KVPolicyError as error:
        return refused(policy.name, length, str(error))
    return decode_record(policy.name, fitted.digest, length, bench.time(plan, length))
