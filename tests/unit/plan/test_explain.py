"""Explanations: the bytes are what a real store and window take, and what the shapes give by hand."""

import json

import attrs
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvpolicy
from kvpolicy.errors import InputError
from kvpolicy.plan.explain import explain
from kvpolicy.plan.explain.reads import reads_of
from kvpolicy.plan.explain.units import human_bytes
from kvpolicy.plan.plan import compile_policy
from kvpolicy.stages import Geometry, Scorer, parameter
from kvpolicy.stages.parameters import Integer
from tests.support.rereading import rereading

LAYERS, QUERY_HEADS, HEADS, DIM, FLOAT = 3, 4, 2, 16, 4
CONFIG = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": QUERY_HEADS,
    "num_key_value_heads": HEADS,
    "head_dim": DIM,
    "max_position_embeddings": 512,
}
PAIR = 2 * DIM * FLOAT
SMALL = {"budget": 16, "protect": {"recent": 2}, "compress": {"every": 4}}


def explained(name, length=100, **overrides):
    return explain(kvpolicy.load(name, **overrides).compile(LlamaConfig(**CONFIG)), length)


def step(explanation, stage):
    (found,) = (one for one in explanation.steps if one.stage == stage)
    return found


@pytest.mark.parametrize("name", ["snapkv", "gkv", "h2o", "pyramidkv", "adakv", "streaming_llm"])
def test_bytes_held_are_those_of_a_real_cache(name):
    """A model that has just outgrown its budget holds, in entries and in queries, what the explanation says."""
    policy = kvpolicy.load(name, **SMALL)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    with policy.attach(model) as attachment, torch.no_grad():
        cache = attachment.cache()
        model.generate(torch.randint(0, 97, (1, 60)), past_key_values=cache, max_new_tokens=20, eos_token_id=None)
    held = sum(layer.storage.nbytes for layer in cache.managed)
    observed = sum(layer.window.nbytes for layer in cache.managed)

    found = explain(policy.compile(model), 79)

    assert found.held_bytes == held
    assert found.window_bytes == observed
    assert found.evicts


def test_full_cache_is_what_transformers_holds():
    """Keys and values of all tokens, layers and KV heads."""
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    with torch.no_grad():
        cache = model(torch.zeros(1, 40, dtype=torch.long)).past_key_values
    held = sum(one.nbytes for layer in cache.layers for one in (layer.keys, layer.values))

    assert explained("full", 40).full_bytes == held == 40 * LAYERS * HEADS * PAIR


def test_steps_by_hand():
    """Attention scoring over T = budget + every = 20 entries, of which N = 16 are left."""
    found = explained("snapkv", **SMALL)
    slots, kept, window = 20 * HEADS, 16 * HEADS, 32

    assert (step(found, "observe").read, step(found, "observe").written) == (4 * QUERY_HEADS * DIM * FLOAT,) * 2
    assert step(found, "score").columns == ("keys", "positions", "queries")
    assert step(found, "score").read == slots * (DIM * FLOAT + 4) + window * QUERY_HEADS * DIM * FLOAT
    assert step(found, "score").written == slots * FLOAT
    assert (step(found, "allocate").read, step(found, "allocate").written) == (slots, HEADS * 8)
    assert (step(found, "select").read, step(found, "select").written) == (slots * 5, slots)
    assert (step(found, "compact").read, step(found, "compact").written) == ((slots - kept) * (PAIR + 4),) * 2
    assert step(found, "compact").reason == "fills holes, at most"
    assert found.moved_bytes == sum(one.read + one.written for one in found.steps)
    assert {one.implementation for one in found.steps} == {"reference"}


def test_what_is_changed_or_packed_is_merged_and_stored():
    """Both touch all that is kept, or looked at."""
    for policy in ("keepkv", "quest"):
        assert [one.stage for one in explained(policy, **SMALL).steps][-2:] == ["merge", "store"]


def test_attention_mass_is_read_and_written_at_every_token():
    """Four tokens on top of a budget of 16: keys and masses of 17, 18, 19 and 20 entries."""
    found = explained("h2o", **SMALL)
    entries, group = (17 + 18 + 19 + 20) * HEADS, QUERY_HEADS // HEADS
    mass, queries = entries * group * FLOAT, 4 * QUERY_HEADS * DIM * FLOAT

    assert step(found, "observe").written == mass
    assert step(found, "observe").read == entries * DIM * FLOAT + queries + mass
    assert found.columns["attention"] == group * FLOAT


def test_chunks_are_read_once_and_no_queries_are_held_behind_a_prompt():
    """Every key and every query of the prompt; a number for each entry is written."""
    model = LlamaForCausalLM(LlamaConfig(**CONFIG)).eval()
    found = explain(kvpolicy.load("compactor", budget=16).compile(model), 100)

    assert step(found, "observe").plugin == "chunks of 256"
    assert step(found, "observe").read == 100 * (HEADS + QUERY_HEADS) * DIM * FLOAT
    assert step(found, "observe").written == 100 * HEADS * FLOAT
    assert found.window_bytes == 0


def test_prompt_only_policies_are_explained_at_the_prompt():
    """Without decoding triggers the one compression is that of the whole prompt."""
    found = explained("snapkv", 100, budget=16, protect={"recent": 2}, compress={"every": "never"})

    assert step(found, "select").written == 100 * HEADS
    assert step(found, "compact").read == 16 * HEADS * (PAIR + 4)
    assert [(layer.budget, layer.capacity) for layer in found.layers] == [(16, 16)] * LAYERS


def test_columns_and_terms_are_named_in_order():
    """Slot state appears among the columns; every term is a step, with its weight."""
    found = explained("gkv", **SMALL)

    assert found.columns == {"keys": DIM * FLOAT, "values": DIM * FLOAT, "positions": 4, "score[0].history": 4}
    assert found.entry_bytes == PAIR + 8
    assert [one.stage for one in found.steps] == ["observe", "score", "score", "allocate", "select", "compact"]
    assert step(found, "compact").read == 16 * HEADS * (PAIR + 8)
    assert step(found, "compact").reason == "closes up, at most"
    assert [one.plugin for one in found.steps if one.stage == "score"] == ["+0.5 history", "-0.5 redundancy"]


def test_short_sequences_evict_nothing():
    """Up to the budget the sequence is held whole, and the table says so."""
    found = explained("snapkv", 500)

    assert not found.evicts
    assert [layer.capacity for layer in found.layers] == [500] * LAYERS
    assert "nothing is evicted up to this length" in str(found)


def test_dictionary_is_json_and_table_has_the_key_lines():
    """Both forms tell budgets, steps and bytes."""
    found = explained("pyramidkv", **SMALL)
    data = json.loads(json.dumps(found.to_dict()))
    text = str(found)

    assert data["digest"] == kvpolicy.load("pyramidkv", **SMALL).digest
    assert sum(layer["budget"] for layer in data["layers"]) == 16 * LAYERS
    assert data["total_bytes"] == found.held_bytes + found.window_bytes
    assert data["share_of_full"] == data["total_bytes"] / found.full_bytes
    for expected in ("Entries per KV head", "entries held, at capacity", "+1 attention", "reference", "positions 4"):
        assert expected in text


def test_length_must_be_positive():
    """A length of nothing is refused."""
    with pytest.raises(InputError, match="length must be at least 1 token: 0"):
        explained("snapkv", 0)


@attrs.frozen
class Broken(Scorer):
    """Cannot be run on the small view."""

    name = "broken"
    most: int = parameter(Integer(minimum=1), 1, help="nothing")

    def score(self, view):
        raise RuntimeError("not today")


def test_a_scorer_that_fails_may_read_everything():
    """A scorer that cannot be watched is charged with all columns, and the reason is kept."""
    found = reads_of(Broken(), Geometry((0,), 4, 2, 8))

    assert found.columns == ("keys", "values", "positions")
    assert found.error == "RuntimeError: not today"


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (5 * 2**30, "5.0 GiB"), (3 * 2**40, "3.00 TiB")],
)
def test_bytes_for_people(count, text):
    """The largest unit that leaves something before the point."""
    assert human_bytes(count) == text


def test_what_is_protected_is_said_and_what_raises_a_share():
    """Half of 10 % of 200 tokens; 50 recent entries are more than that."""
    fine = explained("h2o", 200, budget="10%", protect={"sinks": 4, "recent": "50%"}, compress={"every": 4})
    raised = explained("h2o", 200, budget="10%", protect={"sinks": 4, "recent": 50}, compress={"every": 4})

    assert (fine.protected, fine.raised) == ((4, 10), "")
    assert "protected: 4 sinks and the newest 10" in " ".join(str(fine).split())
    assert raised.protected == (4, 50)
    assert raised.raised.startswith("policy h2o: 10% of 200 tokens is 20 entries, but 54 are held")
    assert raised.raised in " ".join(str(raised).split())
    assert [layer.budget for layer in raised.layers] == [54] * LAYERS


def test_fused_steps_count_what_is_protected():
    """As many bytes are read to choose among candidates, whether what is protected is a number or a share."""
    found = []
    for recent in (8, "50%"):
        spec = kvpolicy.load("snapkv", budget=16, protect={"recent": recent}, compress={"every": 4}).spec
        plan = compile_policy(spec, Geometry((0, 1), 4, 2, 16), "cpu", torch.float32, kernels=True)
        found.append(explain(plan, 100))

    assert [one.read for one in found[0].steps] == [one.read for one in found[1].steps]
    assert step(found[1], "select").read < step(found[1], "compact").read


def test_a_plan_says_whether_scores_may_leave_less_than_the_budget():
    heads = {"heads": {"use": "threshold", "value": 0.5}}
    assert "at most: scores may leave less" in str(explained("snapkv", 1000, budget=64, allocate=heads))
    assert not explained("adakv", 1000, budget=64).at_most
    assert "scores may leave" not in str(explained("adakv", 1000, budget=64))


def test_a_plan_says_whether_all_layers_hold_a_whole_prompt():
    """Where they compete, and where a scorer reads prompts again."""
    ours = compile_policy(rereading().spec, Geometry((0, 1), QUERY_HEADS, HEADS, DIM), "cpu", torch.float32)
    whole = {
        "competing": explained("snapkv", 1000, budget=64, allocate={"joint": {"use": "global"}}),
        "again": explain(ours, 1000),
    }
    for one in whole.values():
        assert "all layers hold all of a prompt until it is compressed" in str(one)
    assert not explained("snapkv", 1000, budget=64).whole_prompt
