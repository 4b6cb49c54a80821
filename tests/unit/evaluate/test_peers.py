"""Peers: the same measures from another process; what fails is a cell that says so."""

import io
import sys
from fractions import Fraction
from pathlib import Path

import attrs
import pytest
import torch
from rich.console import Console

import kvpolicy
from kvpolicy.errors import EvaluationError, InputError
from kvpolicy.evaluate.data.texts import Text
from kvpolicy.evaluate.harness.calibrations import Calibrations
from kvpolicy.evaluate.harness.measure import GroupRun
from kvpolicy.evaluate.harness.measured import Costs, Measured
from kvpolicy.evaluate.harness.record import EvaluationRecord
from kvpolicy.evaluate.harness.run import Evaluation
from kvpolicy.evaluate.harness.setup import FULL, OTHER_PRECISION, EvaluationSetup
from kvpolicy.evaluate.harness.start import Inputs, evaluation_of, head_of
from kvpolicy.evaluate.harness.workers import run_here
from kvpolicy.evaluate.peers import PEERS, peers_of
from kvpolicy.evaluate.peers.client import PeerLoad, Peers
from kvpolicy.evaluate.report.summary import Summary
from kvpolicy.evaluate.report.table import table_of
from kvpolicy.evaluate.tasks.case import Answer, Continuation, Sources, TaskSizes, Turn
from kvpolicy.evaluate.testbed.vocabulary import VOCABULARY
from kvpolicy.peers import environment, python_of
from tests.support.models import build

QUARTER = Fraction(1, 4)
TEXTS = tuple(Text(str(start), " ".join(VOCABULARY[start : start + 200])) for start in (20, 90))
SIZES = TaskSizes(documents=1, length=128, scored=9)
INSTALLED = python_of()


@pytest.fixture(scope="module")
def place(tiny, tmp_path_factory):
    """The folder of the tiny model."""
    folder = tmp_path_factory.mktemp("model")
    for part in tiny:
        part.save_pretrained(folder)
    return str(folder)


def setup_of(*names, tasks=("text",), **options):
    return EvaluationSetup(
        (kvpolicy.load("snapkv"),), tasks, (QUARTER,), SIZES, step=4, precision=False, peers=peers_of(names), **options
    )


def cells_of(tiny, setup, peers):
    made = Evaluation(tiny[0], Sources(tiny[1], TEXTS), setup, Calibrations(tiny[0], lambda: None), peers)
    cells = []
    run_here(made, made.units(), cells.append)
    return {cell.policy: cell for cell in cells}


# -- which there are -------------------------------------------------------------------------------------------


def test_peers_are_each_once_behind_their_own_full_cache():
    assert peers_of([]) == ()
    assert [peer.name for peer in peers_of(["tova", "quanto4", "tova"])] == ["full", "tova", "quanto4"]
    assert peers_of(["all"]) == tuple(PEERS.values())
    with pytest.raises(InputError, match=r"^--peer: unknown: 'snapvk'.*'snapkv'"):
        peers_of(["snapvk"])


def test_those_without_a_share_come_first_and_the_others_behind_our_own():
    assert [one.label for one in setup_of("quanto4", "snapkv").contenders] == [
        *(FULL, "transformers full", "transformers quanto4"),
        *("snapkv 25%", "kvpress snapkv 25%"),
    ]


# -- the real worker, in the environment of these tests, which has no kvpress ------------------------------------


def test_the_same_cache_in_another_process_loses_nothing(tiny, place):
    peers = Peers(PeerLoad(Path(sys.executable), place, "cpu", torch.float32))
    setup = setup_of("snapkv")
    cells = cells_of(tiny, setup, peers)
    full, theirs, press = (cells[name] for name in (FULL, "transformers full", "kvpress snapkv"))

    assert theirs.values["kl"][0] == pytest.approx(0, abs=1e-9)
    assert theirs.values["top1"] == [1.0]
    assert theirs.values["nll"] == pytest.approx(full.values["nll"], abs=1e-5)
    assert theirs.held_bytes == theirs.full_bytes == 128 * 2 * 2 * 2 * 8 * 4
    assert theirs.peer
    assert not full.peer
    assert theirs.versions["torch"] == torch.__version__
    assert theirs.costs["prompt_share"] == theirs.costs["end_share"] == 1.0
    assert min(theirs.costs["prefill_seconds"], theirs.costs["step_seconds"]) > 0
    assert press.refusal == "ModuleNotFoundError: No module named 'kvpress'"
    assert (press.values, press.versions, press.peer) == ({}, {}, True)


def test_what_ours_cost_is_measured_beside_them(tiny):
    """Even where no peer can be measured; without peers, nothing more is measured than before."""
    beside, alone = cells_of(tiny, setup_of("tova"), None), cells_of(tiny, setup_of(), None)

    assert beside["kvpress tova"].refusal == "nothing runs peers here"
    for name in (FULL, "snapkv"):
        assert beside[name].costs.keys() == {"prompt_share", "end_share", "prefill_seconds", "step_seconds"}
        assert beside[name].values == alone[name].values
        assert alone[name].costs == {}
    snapkv = beside["snapkv"]
    assert snapkv.costs["end_share"] == snapkv.held_bytes / snapkv.full_bytes
    assert 0.2 < snapkv.costs["prompt_share"] < 0.35


def test_times_are_those_of_the_first_group_of_the_first_task(tiny):
    """So that a demo is not twice as long; the line of a policy has them all the same."""
    setup = attrs.evolve(setup_of(), times=True, sizes=TaskSizes(documents=2, length=128, scored=9))
    evaluation = Evaluation(tiny[0], Sources(tiny[1], TEXTS), setup, Calibrations(tiny[0], lambda: None), None)
    cells = [cell for unit in evaluation.units() for cell in evaluation.measure(unit)]

    assert {bool(cell.costs) for cell in cells if cell.group == 0 and cell.policy != OTHER_PRECISION} == {True}
    assert {bool(cell.costs) for cell in cells if cell.group == 1} == {False}
    record = EvaluationRecord({"model": {"name": "tiny", "dtype": "float32"}, "sizes": {"length": 128}}, tuple(cells))
    (task,) = Summary(record).tasks
    assert {line.policy for line in task.lines if line.costs} == {FULL, "snapkv"}
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(table_of(record))
    shown = console.export_text()
    assert "step ms" in shown
    assert f"{1000 * next(line for line in task.lines if line.policy == 'snapkv').costs['step_seconds']:.0f}" in shown


# -- whatever a worker says --------------------------------------------------------------------------------------

ANSWERS = """
import json, sys
for line in sys.stdin:
    asked = json.loads(line)
    if "cases" in asked:
        exec({body!r})
    else:
        answer = {{"versions": {{"kvpress": "9"}}}}
    print(json.dumps(answer), flush=True)
"""
FACTS = {"prompt_bytes": 10, "end_bytes": 20, "end_tokens": 50, "prefill_seconds": 1.0, "step_seconds": 0.5}


@pytest.fixture(scope="module")
def model():
    return build(vocab_size=len(VOCABULARY))


def asked(model, tiny, body, *cases, peer="snapkv"):
    """What a worker whose answers are made by `body` gave on cases."""
    run = GroupRun(
        model, tiny[1], cases or [Answer((1, 2, 3, 4), (5, 6), 3, {"words": lambda text: len(text.split())})], 4
    )
    run.full()
    load = PeerLoad(Path(sys.executable), "a/model", "cpu", torch.float32)
    peers = Peers(load, ("-c", ANSWERS.format(body=body)), 20.0)
    try:
        return peers.measured(PEERS[peer], QUARTER, run), run
    finally:
        peers.close()


def tensors(values):
    """The part of a worker that writes tensors."""
    return f"import torch; from safetensors.torch import save_file; save_file({values}, asked['tensors']);"


def test_answers_are_decoded_and_scored_here(model, tiny):
    found, run = asked(model, tiny, f"{tensors('{}')} answer = {{'tokens': [[[7, 8, 9]]], **{FACTS}}}")

    assert found.texts == (run.decoded([7, 8, 9]),)
    assert found.values == {"words": [3.0]}
    assert (found.held_bytes, found.full_bytes) == (10, run.full_bytes_of(4))
    assert found.costs == Costs(10 / run.full_bytes_of(4), 20 / run.full_bytes_of(50), 1.0, 0.5)
    assert found.versions == {"kvpress": "9"}


def test_turns_of_a_conversation_are_scored_one_by_one(model, tiny):
    scores = {"correct": lambda text: float(len(text.split()))}
    case = Answer((1, 2), (3,), 12, scores, (Turn((5, 6), 10, scores),))
    body = (
        f"{tensors('{}')} turns = json.load(open(asked['cases']))['cases'][0]['turns'];"
        f"answer = {{'tokens': [[[one['new_tokens']] * one['new_tokens'] for one in turns]], **{FACTS}}}"
    )
    found, run = asked(model, tiny, body, case)

    assert found.values == {"correct": [11.0], "last": [10.0]}
    assert found.texts == (f"{run.decoded([12] * 12)}\n{run.decoded([10] * 10)}",)


def test_a_worker_is_given_what_the_harness_computed(model, tiny):
    """Each prompt once, cases with the number of theirs, and the share that is to be removed."""
    cases = [Answer(prompt, (5,), 3, {"n": lambda _text: 1.0}) for prompt in ((1, 2), (3, 4), (1, 2))]
    body = (
        f"{tensors('{}')} given = json.load(open(asked['cases']));"
        "rows = [case['prompt'] for case in given['cases']];"
        "fits = given['prompts'] == [[1, 2], [3, 4]] and rows == [0, 1, 0] and asked['ratio'] == 0.75;"
        f"answer = {{'tokens': [[[1] * fits]] * 3, **{FACTS}}}"
    )
    found, run = asked(model, tiny, body, *cases)

    assert found.texts == (run.decoded([1]),) * 3


def test_logits_are_compared_with_those_of_the_full_cache(model, tiny):
    """Of texts that were computed together, each with its own."""
    cases = [Continuation((1, 2, 3), tuple(range(start, start + 8))) for start in (10, 30)]
    run = GroupRun(model, tiny[1], cases, 4)
    run.full()
    with torch.no_grad():
        exact = [model(torch.tensor([case.prompt + case.text])).logits[0, 3:-1] for case in cases]

    for index, logits in enumerate(exact):
        assert run.compared_with_full(index, logits)["kl"] == pytest.approx(0, abs=1e-6)
        assert run.compared_with_full(1 - index, logits)["kl"] > 1e-3


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("answer = {'error': 'broken\\nin two'}", "^broken$"),
        ("raise SystemExit('out of memory')", "^peer: out of memory$"),
        ("answer = {'tokens': []}", "^its logits cannot be read: "),
        (f"{tensors('{}')} answer = {{'tokens': []}}", "^its answer does not fit the cases: "),
        (f"{tensors('{}')} answer = {{'tokens': [[[1]]]}}", "^its answer does not fit the cases: 'prompt_bytes'"),
    ],
)
def test_a_worker_that_fails_is_one_line(model, tiny, body, message):
    with pytest.raises(InputError, match=message):
        asked(model, tiny, body)


def test_models_that_hold_less_than_the_context_are_not_compared(tiny):
    with pytest.raises(EvaluationError, match="hold the whole context only"):
        asked(build("gemma3", vocab_size=len(VOCABULARY)), tiny, "answer = {}")


class Dying:
    """Peers whose worker dies on one of them."""

    closed = False

    def measured(self, peer, share, run):
        if peer.name == "tova":
            raise InputError("peer: killed")
        return Measured({name: [0.5] for name in ("kl", "top1", "agreed", "nll")}, 1.0, 10, 40, ("",))

    def close(self):
        self.closed = True


def test_a_peer_whose_worker_dies_costs_its_own_cell_only(tiny):
    peers = Dying()
    cells = cells_of(tiny, setup_of("tova", "snapkv"), peers)

    assert cells["kvpress tova"].refusal == "peer: killed"
    assert cells["kvpress snapkv"].values["kl"] == [0.5]
    assert cells["kvpress snapkv"].share == 0.25
    assert cells["snapkv"].values
    assert peers.closed


# -- from end to end -------------------------------------------------------------------------------------------


def test_peers_that_are_not_installed_are_told_before_anything_is_measured(tiny, place, tmp_path, monkeypatch):
    monkeypatch.setenv("KVPOLICY_PEERS", str(tmp_path))
    inputs = Inputs(place, "cpu", None, TEXTS, (), setup_of("tova"))

    with pytest.raises(InputError, match="--peer: kvpress is not installed"):
        evaluation_of(*tiny, inputs)
    assert head_of(tiny[0], inputs)["peers"] == ["transformers full", "kvpress tova"]
    assert "peers" not in head_of(tiny[0], attrs.evolve(inputs, setup=setup_of()))


@pytest.mark.skipif(INSTALLED is None, reason="NOT RUN: kvpolicy bench peers install has not been run here")
def test_kvpress_really_holds_what_the_cell_says(tiny, place, monkeypatch):
    """A press that evicts holds its share; one that masks holds everything, whatever its ratio."""
    monkeypatch.setattr(environment, "python_of", lambda _folder=None: INSTALLED)
    evaluation = evaluation_of(*tiny, Inputs(place, "cpu", None, TEXTS, (), setup_of("snapkv", "adakv")))
    cells = {}
    run_here(evaluation, evaluation.units(), lambda cell: cells.update({cell.policy: cell}))
    full, snapkv, adakv = (cells[name] for name in ("transformers full", "kvpress snapkv", "kvpress adakv"))

    assert full.values["kl"][0] == pytest.approx(0, abs=1e-6)
    assert full.versions["transformers"].startswith("5.2.")
    assert snapkv.held_bytes == snapkv.full_bytes / 4
    assert adakv.held_bytes == adakv.full_bytes
    assert 0 < snapkv.values["kl"][0] < 10
