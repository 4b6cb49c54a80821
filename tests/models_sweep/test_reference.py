"""The reference notices what the sweep is there to find."""

import attrs
import pytest
import torch

from tests.models_sweep.examine import CHUNKS, POLICIES, TOLERANCE, long_batch, off
from tests.models_sweep.pairs import Pair
from tests.models_sweep.reference import as_held, through
from tests.models_sweep.tiny import build


@pytest.fixture(scope="module")
def models():
    return build(Pair("text", "llama")), build(Pair("text", "llama"))


@pytest.fixture(scope="module", params=["snapkv", "snapkv+rotation"])
def run(models, request):
    with POLICIES[request.param].attach(models[0]) as attachment:
        return through(models[0], attachment.cache(), long_batch(), CHUNKS)


def difference(models, run, change):
    """Between what the policy computed and the plain model that sees a record with one entry changed."""
    logits, record = run
    layer = record[3][1]
    changed = [*record[:3], {**record[3], 1: change(layer)}, *record[4:]]
    return off(logits, as_held(models[1], long_batch(), CHUNKS, changed), long_batch())


def without(held, row, head, slot):
    positions = held.positions.clone()
    positions[row, head, slot] = -1
    return attrs.evolve(held, positions=positions)


def test_it_computes_what_the_policy_computes(models, run):
    assert difference(models, run, lambda held: held) < TOLERANCE


@pytest.mark.parametrize("row", [0, 1])
@pytest.mark.parametrize("head", [0, 1])
def test_one_entry_of_one_head_matters(models, run, row, head):
    assert difference(models, run, lambda held: without(held, row, head, 3)) > 10 * TOLERANCE


@pytest.mark.parametrize("what", ["keys", "values"])
def test_what_an_entry_holds_matters(models, run, what):
    def turned(held):
        vectors = getattr(held, what).clone()
        vectors[0, 1, 3] = torch.roll(vectors[0, 1, 3], 1)
        return attrs.evolve(held, **{what: vectors})

    assert difference(models, run, turned) > 10 * TOLERANCE
