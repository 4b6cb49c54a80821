"""Layers are full to the brim and compressed by the call that is timed; floors follow from what is read and moved."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import kvpolicy
from kvpolicy.bench.cases.filled_layers import due, plan_at, random_layers
from kvpolicy.bench.cases.floors import COPY, GEMM, LARGE, Floors
from kvpolicy.bench.protocol.model_shapes import attention_shape, model_shape, random_model
from kvpolicy.bench.protocol.peak_memory import peak_bytes
from kvpolicy.errors import InputError

CPU = torch.device("cpu")
SHAPE = attention_shape(3, 4, 2, 8)


def layers_of(plan, length, rows=1):
    return random_layers(plan, SHAPE, rows, length)


@pytest.mark.parametrize(
    "name", ["snapkv", "rkv", "adakv", "pyramidkv", "gkv", "h2o", "tova", "streaming_llm", "leverage"]
)
def test_the_timed_call_compresses_all_layers_once(name):
    policy = kvpolicy.load(name, budget=40, protect={"sinks": 2, "recent": 33})
    plan = plan_at(policy.spec, SHAPE, 100, torch.float32, CPU)
    cache, finish_forward = due(plan, SHAPE, layers_of(plan, 100, rows=2))

    assert [one.compressions for one in cache.stats] == [0, 0, 0]
    assert [one.storage.slots.average for one in cache.managed] == [100.0] * 3
    finish_forward()
    assert [one.compressions for one in cache.stats] == [1, 1, 1]
    assert sum(one.storage.slots.average for one in cache.managed) == 3 * 40


@pytest.mark.parametrize("name", ["full", "rkv"])
def test_what_evicts_nothing_is_refused(name):
    with pytest.raises(InputError, match=f"policy {name} evicts nothing at 100 entries"):
        plan_at(kvpolicy.load(name, compress={"every": "never"}).spec, SHAPE, 100, torch.float32, CPU)


def test_a_budget_that_holds_everything_is_refused():
    with pytest.raises(InputError, match="evicts nothing"):
        plan_at(kvpolicy.load("rkv", budget=100).spec, SHAPE, 100, torch.float32, CPU)


def test_shared_keys_resemble_each_other_and_isotropic_ones_do_not():
    means = []
    for keys in ("shared", "isotropic"):
        shape = attention_shape(1, 2, 1, 64)
        plan = plan_at(kvpolicy.load("snapkv", budget=40).spec, shape, 200, torch.float32, CPU)
        (one,) = random_layers(plan, shape, 1, 200, keys)
        directions = torch.nn.functional.normalize(one.keys[0, 0], dim=-1)
        means.append(float((directions @ directions.T).mean()))
    assert means[0] > 0.3
    assert means[1] < 0.1


@pytest.mark.parametrize(
    ("name", "scanned", "window"), [("snapkv", 1, 32), ("rkv", 1, 8), ("streaming_llm", 0, 0), ("blend", 2, 32)]
)
@pytest.mark.parametrize("length", [60, 200])
def test_floor_counts_what_scorers_read_and_the_fewer_rows_that_could_move(name, scanned, window, length):
    protect = {"sinks": 2, "recent": 33}
    plan = plan_at(kvpolicy.load(name, budget=40, protect=protect).spec, SHAPE, length, torch.bfloat16, CPU)
    layers = layers_of(plan, length, rows=2)
    floors = Floors.of(plan, layers, 40)

    row = 3 * 2 * 2 * 8 * 2  # layers, rows, KV heads, head dim, bytes
    assert floors.window == (plan.needs.queries if name == "blend" else window)
    assert floors.moved == row * (scanned * length + 4 * min(40, length - 40))


def test_floor_is_bytes_over_the_rate_of_the_copy_and_the_time_of_the_products():
    plan = plan_at(kvpolicy.load("rkv", budget=40).spec, SHAPE, 100, torch.float32, CPU)
    floors = Floors.of(plan, layers_of(plan, 100), 40)
    found = floors.seconds({COPY: (2.0, 1.0, 4.0), GEMM: (0.3, 0.1, 0.2)})

    assert found == {"bytes": floors.moved * 2.0 / (2 * LARGE["cpu"]), "gemm": 0.2}
    assert [one.name for one in floors.variants()] == [COPY, GEMM]


def test_products_are_those_of_all_window_queries_with_all_keys():
    plan = plan_at(kvpolicy.load("rkv", budget=40).spec, SHAPE, 100, torch.float32, CPU)
    layers = layers_of(plan, 100)
    products = Floors.of(plan, layers, 40).variants()[1].fresh()
    with FlopCounterMode(display=False) as counter:
        products()

    assert counter.get_total_flops() == 3 * 2 * (4 * 8) * 8 * 100  # layers, mul-add, query rows, head dim, keys


def test_peak_counts_what_lives_at_one_time():
    def call():
        first = torch.zeros(1000)
        second = first + 1
        del first
        view = second[:10]
        third = torch.zeros(500)
        return view, third

    assert peak_bytes(call, CPU) == 8000
    assert peak_bytes(lambda: torch.zeros(10).add_(1), CPU) == 40
    assert peak_bytes(lambda: [torch.zeros(10) for _ in range(3)], CPU) == 120


def test_same_shape_gives_the_same_weights_and_leaves_the_globals():
    before = torch.get_default_dtype(), torch.random.get_rng_state()
    one, two = (random_model(model_shape("tiny"), 10, CPU, torch.bfloat16) for _ in range(2))

    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert one.dtype == torch.bfloat16
    assert torch.get_default_dtype() == before[0]
    assert torch.equal(torch.random.get_rng_state(), before[1])


@pytest.mark.parametrize("heads", [(1, 3, 2, 8), (0, 4, 2, 8), (1, 4, 2, 0)])
def test_heads_that_cannot_share_are_refused(heads):
    with pytest.raises(InputError, match="cannot share"):
        attention_shape(*heads)


def test_unknown_model_is_refused():
    with pytest.raises(InputError, match="--model must be one of tiny, small, 135m, 267m, 8b: 'huge'"):
        model_shape("huge")
