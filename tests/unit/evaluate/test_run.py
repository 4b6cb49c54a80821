"""An evaluation measures every cell, or says why it cannot."""

from fractions import Fraction

import attrs
import pytest
import torch

import kvpolicy
from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.data.texts import Text
from kvpolicy.evaluate.harness.calibrations import Calibrations
from kvpolicy.evaluate.harness.measure import GroupRun
from kvpolicy.evaluate.harness.run import Evaluation
from kvpolicy.evaluate.harness.setup import FULL, OTHER_PRECISION, EvaluationSetup
from kvpolicy.evaluate.harness.start import Inputs, calibrations_of, head_of
from kvpolicy.evaluate.harness.workers import run_here
from kvpolicy.evaluate.tasks.case import Sources, TaskSizes
from kvpolicy.evaluate.testbed.vocabulary import VOCABULARY
from tests.support.untrained_testbed import untrained_testbed
from tests.testbed_training.tokenizer import build_tokenizer

QUARTER, TINY = Fraction(1, 4), Fraction(1, 500)
TEXTS = tuple(
    Text(name, " ".join(VOCABULARY[10 + (start + 7 * place) % 300] for place in range(400)))
    for name, start in (("one", 0), ("two", 50), ("three", 90))
)


def setup_of(*policies, shares=(QUARTER,), tasks=("text",), **options):
    return EvaluationSetup(policies, tasks, shares, TaskSizes(documents=2, length=128, scored=9), step=4, **options)


def evaluation(tiny, setup):
    calibrations = Calibrations(tiny[0], lambda: torch.arange(8, 8 + 64).reshape(2, 32))
    return Evaluation(tiny[0], Sources(tiny[1], TEXTS[:2]), setup, calibrations)


def cells_of(made, units=None):
    found = []
    run_here(made, made.units() if units is None else units, found.append)
    return found


@pytest.fixture(scope="module")
def policies():
    """One that evicts, one that keeps everything, and two that cannot be used with the model."""
    return (
        kvpolicy.load("snapkv"),
        kvpolicy.load("kivi4", store={"use": "kivi", "bits": 4, "group": 8, "residual": 16}),
        kvpolicy.load("kivi2"),
        kvpolicy.load("sals25"),
    )


# -- which cells there are -------------------------------------------------------------------------------------


def test_contenders_are_the_full_cache_those_without_a_share_and_the_others_at_each(policies):
    setup = setup_of(*policies, kvpolicy.load("full"), kvpolicy.load("quest"), shares=(QUARTER, TINY))

    assert [contender.label for contender in setup.contenders] == [
        *("full cache", "kivi4", "kivi2"),
        *("snapkv 25%", "sals25 25%", "quest 25%"),
        *("snapkv 0.2%", "sals25 0.2%", "quest 0.2%"),
    ]


def test_units_are_what_has_not_been_measured(tiny, policies):
    """Another precision is measured of predictions only."""
    made = evaluation(tiny, setup_of(policies[0], tasks=("text", "recall")))
    everything = [(unit.task, unit.group, [one.name for one in unit.contenders]) for unit in made.units()]
    done = {("text", 0, FULL, None), ("text", 0, OTHER_PRECISION, None), ("text", 0, "snapkv", 0.25)}
    left = made.units({*done, ("text", 1, "snapkv", 0.25), ("recall", 0, "snapkv", 0.125)})

    assert everything == [
        ("text", 0, [FULL, OTHER_PRECISION, "snapkv"]),
        ("text", 1, [FULL, OTHER_PRECISION, "snapkv"]),
        ("recall", 0, [FULL, "snapkv"]),
    ]
    assert [(unit.task, unit.group, [one.name for one in unit.contenders]) for unit in left] == [
        ("text", 1, [FULL, OTHER_PRECISION]),
        ("recall", 0, [FULL, "snapkv"]),
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": TaskSizes(documents=0)}, "documents must be at least 1: 0"),
        ({"sizes": TaskSizes(questions=0)}, "questions must be at least 1: 0"),
        ({"sizes": TaskSizes(scored=1)}, "scored must be at least 2: 1"),
        ({"sizes": TaskSizes(seed=-1)}, "seed must be at least 0: -1"),
        ({"sizes": TaskSizes(length=5), "tasks": ("recall",)}, "length must be from 128 to 2048: 5"),
        ({"tasks": ("recal",)}, "task: unknown: 'recal'"),
        ({"shares": (Fraction(1),)}, "a share must be above 0% and below 100%: 100%"),
        ({"shares": (QUARTER, Fraction(1, 8), QUARTER)}, "shares must be different: 25%, 12.5%, 25%"),
        ({"policies": (kvpolicy.load("rkv"), kvpolicy.load("rkv"))}, "policies must have different names: rkv"),
    ],
)
def test_bad_setups_are_refused(policies, change, message):
    with pytest.raises(EvaluationError, match=message):
        attrs.evolve(setup_of(policies[0]), **change)


# -- what is measured ------------------------------------------------------------------------------------------


def test_what_cannot_be_measured_is_a_cell_with_its_reason_and_costs_no_other(tiny, policies):
    """A store that does not go with the model, a calibration that fails, a share that holds no entry."""
    made = evaluation(tiny, setup_of(*policies, shares=(QUARTER, TINY)))
    cells = {(cell.policy, cell.share): cell for cell in cells_of(made, made.units()[:1])}
    refused = {key: cell.refusal for key, cell in cells.items() if cell.refusal}

    assert len(cells) == 8
    assert set(refused) == {("kivi2", None), ("snapkv", 0.002), ("sals25", 0.25), ("sals25", 0.002)}
    assert refused["snapkv", 0.002] == "snapkv: 0.2% of 136 tokens leaves no room for an entry"
    assert "group" in refused["kivi2", None]
    for key, cell in cells.items():
        assert bool(cell.values) == (key not in refused)
        assert cell.prompt_tokens == 128
    assert cells["snapkv", 0.25].fitted.startswith("kvpolicy: 1")
    assert kvpolicy.attached(tiny[0]) is None


def test_cells_say_what_they_were_measured_with(tiny, policies):
    """The policy as it was fitted, its digest, the bytes: those of the plan with as many entries as are left."""
    made = evaluation(tiny, setup_of(*policies[:2]))
    full, other, whole, snapkv = cells_of(made, made.units()[:1])
    plan = kvpolicy.fit(policies[0], tiny[0], share=QUARTER, length=136).compile(tiny[0])

    assert [cell.key for cell in (full, other)] == [("text", 0, FULL, None), ("text", 0, OTHER_PRECISION, None)]
    assert full.full_bytes == full.held_bytes == other.full_bytes * 2 == 136 * 2 * 2 * 2 * 8 * 4
    assert (full.values["kl"], full.fitted) == ([0.0], None)
    assert 0 < other.values["kl"][0] < 0.01
    assert snapkv.digest == kvpolicy.policy.Policy(plan.spec).digest
    assert snapkv.fitted == kvpolicy.policy.Policy(plan.spec).to_yaml()
    assert 0.8 < snapkv.held_bytes / (full.full_bytes / 4) <= 1
    assert whole.share is None
    assert whole.held_bytes < full.held_bytes


def test_the_same_cells_come_out_in_whatever_order(tiny, policies):
    made, again = (evaluation(tiny, setup_of(policies[0])) for _ in range(2))
    first = cells_of(made)
    turned = [attrs.evolve(unit, contenders=unit.contenders[::-1]) for unit in again.units()[::-1]]

    assert _comparable(cells_of(again, turned)) == _comparable(first)


def _comparable(cells):
    return sorted(
        ((cell.key, cell.values, cell.held_bytes, cell.full_bytes, cell.fitted, cell.refusal) for cell in cells),
        key=lambda cell: repr(cell[0]),
    )


# -- memory ----------------------------------------------------------------------------------------------------

ERRORS = {
    "python": MemoryError(),
    "the allocator": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9"),
    "the accelerator": torch.OutOfMemoryError("CUDA out of memory"),
}


def _raising(error):
    def fails(*_args):
        raise error

    return fails


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_cell_for_which_there_is_no_memory_says_so(tiny, policies, monkeypatch, error):
    made = evaluation(tiny, setup_of(policies[0]))
    monkeypatch.setattr(GroupRun, "under", _raising(error))
    cells = cells_of(made, made.units()[:1])

    assert [cell.refusal for cell in cells] == ["", "", "does not fit into memory"]
    assert kvpolicy.attached(tiny[0]) is None


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_without_memory_for_the_full_cache_no_cell_of_the_group_is_measured(tiny, policies, monkeypatch, error):
    made = evaluation(tiny, setup_of(policies[0]))
    monkeypatch.setattr(GroupRun, "full", _raising(error))

    assert [cell.refusal for cell in cells_of(made, made.units()[:1])] == ["does not fit into memory"] * 3


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_a_store_for_whose_calibration_there_is_no_memory_costs_its_own_cells_only(tiny, monkeypatch, error):
    made = evaluation(tiny, setup_of(kvpolicy.load("tada"), kvpolicy.load("streaming_llm"), precision=False))
    monkeypatch.setattr(kvpolicy.Policy, "calibrate", _raising(error))
    cells = cells_of(made, made.units()[:1])

    assert [(cell.policy, cell.refusal) for cell in cells] == [
        ("full cache", ""),
        ("tada", "does not fit into memory"),
        ("streaming_llm", ""),
    ]


@pytest.mark.parametrize("place", ["full", "under"])
def test_any_other_error_goes_on(tiny, policies, monkeypatch, place):
    """The model is given back all the same."""
    made = evaluation(tiny, setup_of(policies[0]))
    monkeypatch.setattr(GroupRun, place, _raising(RuntimeError("shapes do not match")))

    with pytest.raises(RuntimeError, match="shapes do not match"):
        cells_of(made)
    assert kvpolicy.attached(tiny[0]) is None


# -- where it starts -------------------------------------------------------------------------------------------


def inputs_of(model, setup, **changes):
    return Inputs(model, "cpu", changes.pop("dtype", None), TEXTS[:2], TEXTS[2:], setup)


def test_the_head_says_what_decides_the_numbers(tiny, policies):
    setup = setup_of(*policies[:2], shares=(QUARTER, Fraction(1, 8)))
    head = head_of(tiny[0], inputs_of("a/model", setup))

    assert head["policies"] == {policy.name: policy.digest for policy in policies[:2]}
    assert head["model"]["name"] == "a/model"
    assert head["model"]["dtype"] == "float32"
    assert head["model"]["parameters"] == sum(weight.numel() for weight in tiny[0].parameters())
    assert head["shares"] == [0.25, 0.125]
    assert head["sizes"]["documents"] == 2
    assert set(head["texts"]) == {"one", "two"}
    assert set(head["calibration_texts"]) == {"three"}
    assert head["versions"]["torch"] == torch.__version__


def test_stores_are_calibrated_on_other_texts_than_the_cases(tiny):
    """With texts, on pieces of those held back; without, on text like that which the embedded model learned."""
    words = Text("held back", " ".join(VOCABULARY[20 + place % 40] for place in range(8 * 1024)))
    inputs = attrs.evolve(inputs_of("x", setup_of()), calibration_texts=(words,))
    real = calibrations_of(*tiny, inputs).tokens
    generated = calibrations_of(*tiny, attrs.evolve(inputs, calibration_texts=())).tokens

    assert real.shape == (8, 1024)
    assert set(real[:, 1:].unique().tolist()) <= set(range(20, 60))
    assert generated.shape == (16, 1024)


def test_cases_that_are_longer_than_the_model_knows_are_refused():
    """Before anything is measured: beyond its positions a model says nothing about policies."""
    model, tokenizer = untrained_testbed(max_position_embeddings=100), build_tokenizer()
    setup = EvaluationSetup((), ("recall",), sizes=TaskSizes(documents=1, length=128))
    with pytest.raises(EvaluationError, match=r"recall: takes 1[0-9][0-9] tokens, and the model knows 100 positions"):
        Evaluation(model, Sources(tokenizer, ()), setup, Calibrations(model, lambda: None))
