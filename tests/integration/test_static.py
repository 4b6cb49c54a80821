"""`attach(model, graph=True)`: decode steps of fixed shapes give what decode steps of any shape give."""

import copy
import gc
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import attrs
import pytest
import torch

from kvpolicy.errors import (
    CacheError,
    KVPolicyError,
    NonFiniteScoreWarning,
    ParameterError,
    PolicyError,
    UnsupportedModelError,
)
from kvpolicy.runtime.static.session import Session
from kvpolicy.stages import LayerAllocator, Selector
from kvpolicy_plugins.selectors.topk import TopK
from tests import fingerprint
from tests.models import build, difference, generate, model, prompt
from tests.oracle import masked_forward, step_by_step
from tests.policies import EVEN, held, small

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
ROWS = {"one": (40,), "padded": (40, 25, 31), "short": (5,), "mixed": (7, 30)}
TOLERANCE = 5e-5


@pytest.fixture
def steps(monkeypatch):
    """The sessions by which decode steps were served, one entry a step."""
    served, run = [], Session.run

    def recorded(session, tokens, places):
        logits = run(session, tokens, places)
        served.append(session)
        return logits

    monkeypatch.setattr(Session, "run", recorded)
    return served


def both(policy, one, tokens, mask, **options):
    """What generate gives without fixed shapes and with them, the reports, and the positions held in the end."""
    found = []
    for graph in (False, True):
        with policy.attach(one, graph=graph) as attachment:
            output = generate(one, tokens, mask, past_key_values=(cache := attachment.cache()), **options)
            found.append((output, attachment.report(), held(cache)))
    return zip(*found, strict=True)


def assert_alike(policy, one, tokens, mask, **options):
    (free, fixed), reports, positions = both(policy, one, tokens, mask, **options)
    assert torch.equal(free.sequences, fixed.sequences)
    assert difference(free, fixed) <= TOLERANCE
    assert positions[0] == positions[1]
    for layer, other in zip(*(report.layers for report in reports), strict=True):
        assert (layer.seen, layer.held, layer.compressions, layer.decode_steps) == (
            other.seen,
            other.held,
            other.compressions,
            other.decode_steps,
        )
        assert layer.read == pytest.approx(other.read)


def fed(one, cache, tokens, *ends):
    """Logits [B, V] behind the last token of each forward; a forward ends at each of `ends`."""
    starts = (cache.get_seq_length(), *ends)
    with torch.no_grad():
        forwards = [one(tokens[:, start:end], past_key_values=cache) for start, end in itertools.pairwise(starts)]
    return [output.logits[:, -1] for output in forwards]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("name", EVEN)
def test_tokens_and_entries_are_the_same(name, rows, device, steps):
    tokens, mask = (one.to(device) for one in prompt(*ROWS[rows]))
    assert_alike(small(name), build().to(device), tokens, mask, count=32)
    assert len(steps) == 30  # all but the prompt's and the first


@pytest.mark.parametrize("every", [1, 2, 7])
@pytest.mark.parametrize("name", ["h2o", "tova", "streaming_llm", "rkv"])
def test_any_rhythm_of_compressions_is_kept(name, every, steps):
    assert_alike(small(name, every=every), model(), *prompt(33, 14), count=30)
    assert len(steps) == 28


@pytest.mark.parametrize("shape", [{"num_key_value_heads": 1}, {"num_key_value_heads": 4}], ids=["MQA", "MHA"])
@pytest.mark.parametrize("name", ["gkv", "h2o"])
def test_any_number_of_heads(name, shape, steps):
    assert_alike(small(name), model(**shape), *prompt(30, 22))
    assert len(steps) == 22


@pytest.mark.parametrize("architecture", ["qwen2", "qwen3", "mistral", "phi3"])
def test_other_architectures(architecture, steps):
    assert_alike(small("snapkv"), model(architecture), *prompt(30, 22))
    assert len(steps) == 22


@pytest.mark.parametrize("name", ["snapkv", "h2o", "gkv"])
def test_half_precision(name, steps):
    one = model(dtype=torch.bfloat16)
    (free, fixed), _, _ = both(small(name), one, *prompt(30, 22), count=30)
    assert len(steps) == 28
    first = [torch.stack(output.logits[:9]) for output in (free, fixed)]  # until entries of equal worth may part ways
    assert (first[0] - first[1]).abs().max() <= 2**-4 * first[0].abs().max()


def test_sampling_draws_the_same_tokens(steps):
    drawn = []
    for graph in (False, True):
        torch.manual_seed(3)
        with small("rkv").attach(model(), graph=graph):
            drawn.append(generate(model(), *prompt(30, 21), do_sample=True, num_return_sequences=2).sequences)
    assert torch.equal(*drawn)
    assert len(steps) == 22


def test_a_large_budget_changes_nothing_but_rounding(steps):
    tokens, mask = prompt(20, 11)
    plain = generate(model(), tokens, mask)
    with small("snapkv", budget=64).attach(model(), graph=True):
        attached = generate(model(), tokens, mask)
    assert torch.equal(plain.sequences, attached.sequences)
    assert difference(plain, attached) <= TOLERANCE
    assert len(steps) == 22


@pytest.mark.parametrize("name", EVEN)
def test_logits_are_those_of_the_plain_model_that_sees_what_is_held(name, steps):
    one, tokens = model(), prompt(64, 64, seed=5)[0]
    with small(name).attach(one, graph=True) as attachment:
        logits, seen = step_by_step(one, attachment.cache(), tokens, (40, *[1] * 24))
    assert len(steps) == 23  # what is held is looked at between the steps: the cache gets in 23 times
    assert torch.allclose(logits, masked_forward(one, tokens, seen), rtol=0, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_storages_and_shapes_stay_the_same_for_generations_and_rounds(device, steps, monkeypatch):
    one, seen, run = build().to(device), [], Session.run

    def recorded(session, tokens, places):
        tensors = [tensor for layer in session.layers for tensor in layer.slots.tensors + layer.slots.window]
        seen.append([(tensor.data_ptr(), tensor.shape, tensor.stride()) for tensor in tensors])
        return run(session, tokens, places)

    monkeypatch.setattr(Session, "run", recorded)
    with small("gkv").attach(one, graph=True) as attachment:
        for lengths in ((40, 20), (17, 30)):
            tokens, mask = (part.to(device) for part in prompt(*lengths))
            generate(one, tokens, mask)
            assert min(layer.compressions for layer in attachment.report().layers) > 5
    assert len(seen) == 44
    assert all(other == seen[0] for other in seen)


def test_what_is_reported_in_bytes_is_what_is_held(steps):
    with small("h2o").attach(model(), graph=True) as attachment:
        cache = attachment.cache()
        generate(model(), *prompt(40, 20), past_key_values=cache)
        reported = attachment.report()
    stored = [layer.held.nbytes for layer in cache.managed]
    assert [layer.nbytes for layer in reported.layers] == stored
    slots, entry = 2 * 2 * (12 + 4), 2 * 8 * 4 + 4 + 2 * 4  # rows, heads, slots; key and value, position, attention
    assert stored == [slots * entry] * 3


def test_the_storage_serves_one_generation_after_the_other_and_caches_are_let_go(steps):
    with small("rkv").attach(model(), graph=True):
        gc.collect()
        for _ in range(3):
            generate(model(), *prompt(30, 20), return_dict_in_generate=False, output_logits=False)
            assert not any(one() for one in steps[-1]._tenant), "the cache outlives its generation"
    assert len(set(map(id, steps))) == 1


def test_another_batch_has_a_storage_of_its_own(steps):
    with small("rkv").attach(model(), graph=True):
        for lengths in ((30,), (30, 20), (30,)):
            generate(model(), *prompt(*lengths))
    assert [session.rows for session in dict.fromkeys(steps)] == [1, 2, 1]


def test_two_caches_take_turns():
    texts = [prompt(30, seed=seed)[0] for seed in (0, 1)]
    alone = {}
    for graph, turns in (
        (False, [0] * 9),
        (False, [1] * 9),
        (True, [0, 0, 0, 1, 1, 1, 1, 0, 0, 0, 1, 1, 1, 1, 0, 0, 1, 0]),
    ):
        with small("gkv").attach(model(), graph=graph) as attachment, torch.no_grad():
            caches, said = [attachment.cache() for _ in texts], {0: [], 1: []}
            for turn in turns:
                cache, start = caches[turn], caches[turn].get_seq_length()
                fed = texts[turn][:, start : start + 1] if start else texts[turn][:, :20]
                said[turn].append(model()(fed, past_key_values=cache).logits[:, -1])
        for turn in set(turns):
            logits = torch.cat(said[turn])
            expected = alone.setdefault(turn, logits)
            assert logits.shape == expected.shape
            assert (logits - expected).abs().max() <= TOLERANCE


def conversation(graph):
    """Two turns, with tokens undone in between and rows moved; logits of all forwards, and what is held in the end."""
    one, tokens, said = model(), prompt(60, 60)[0], []
    with small("snapkv", every=8).attach(one, graph=graph) as attachment:
        cache = attachment.cache()
        said += fed(one, cache, tokens, 20, *range(21, 27))
        cache.crop(-2)
        said += fed(one, cache, tokens, *range(25, 33))
        said += fed(one, cache, tokens, 40, *range(41, 47))
        cache.reorder_cache(torch.tensor([1, 0]))
        said += fed(one, cache, tokens, *range(47, 53))
        cache.batch_select_indices(torch.tensor([1]))
        said += fed(one, cache, tokens[1:], *range(53, 61))
    return torch.cat(said), held(cache)


def test_turns_rollbacks_and_moved_rows_come_in_between(steps):
    (free, ours), (fixed, theirs) = conversation(graph=False), conversation(graph=True)
    assert (free - fixed).abs().max() <= TOLERANCE
    assert ours == theirs
    assert len(steps) == 5 + 7 + 5 + 5 + 7  # all decode steps but the first of each stretch


@pytest.mark.parametrize("options", [{"num_beams": 3}, {"prompt_lookup_num_tokens": 3}], ids=["beams", "lookup"])
def test_decoding_that_moves_or_undoes_goes_on_as_ever(options, steps):
    tokens, mask = prompt(40)
    found = []
    for graph in (False, True):
        with small("snapkv").attach(model(), graph=graph):
            found.append(generate(model(), tokens, mask, output_logits=False, **options).sequences)
    assert torch.equal(*found)
    assert not steps


def test_tokens_that_may_be_undone_are_left_to_the_model(steps):
    tokens, found = prompt(50)[0], []
    for graph in (False, True):
        with small("snapkv").attach(model(), graph=graph) as attachment, torch.no_grad():
            cache = attachment.cache()
            fed(model(), cache, tokens, 20, *range(21, 26))
            cache.activate_past_recording()
            fed(model(), cache, tokens, *range(26, 33))  # an eviction would be due
            cache.crop(-5)
            cache.stop_recording()
            found.append(torch.cat(fed(model(), cache, tokens, *range(28, 41))))
    assert (found[0] - found[1]).abs().max() <= TOLERANCE
    assert len(steps) == 4 + 12


def test_what_an_earlier_cache_has_left_is_never_seen(steps):
    tokens, mask = prompt(7)
    with small("snapkv").attach(model()):
        expected = generate(model(), tokens, mask)
    with small("snapkv").attach(model(), graph=True):
        generate(model(), *prompt(30), return_dict_in_generate=False, output_logits=False)
        for layer in steps[-1].layers:
            for tensor in (layer.slots.keys, layer.slots.values, *layer.slots.columns.values()):
                tensor.fill_(torch.nan if tensor.is_floating_point() else 3)
        found = generate(model(), tokens, mask)
    assert len(set(map(id, steps))) == 1
    assert difference(expected, found) <= TOLERANCE


def test_threads_take_turns():
    texts = [prompt(30, 21, seed=seed) for seed in (0, 1)]
    with small("rkv").attach(model()):
        expected = [generate(model(), *text).sequences for text in texts]
    with small("rkv").attach(model(), graph=True), ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda text: generate(model(), *text).sequences, texts))
    assert all(map(torch.equal, expected, found))


def test_a_copied_cache_goes_its_own_way(steps):
    one, tokens = model(), prompt(40, seed=2)[0]
    with small("rkv").attach(one, graph=True) as attachment, torch.no_grad():
        cache = attachment.cache()
        fed(one, cache, tokens, 20, *range(21, 26))
        assert steps
        other = copy.deepcopy(cache)
        ends = [torch.cat(fed(one, each, tokens, *range(26, 34))) for each in (cache, other)]
        assert held(cache) == held(other)
    assert (ends[0] - ends[1]).abs().max() <= TOLERANCE


def test_tokens_may_be_given_by_place_and_without_a_mask(steps):
    one, tokens = model(), prompt(30)[0]
    with small("rkv").attach(one, graph=True) as attachment, torch.no_grad():
        cache = attachment.cache()
        for begin, end in itertools.pairwise([0, 20, *range(21, 26)]):
            output = one(tokens[:, begin:end], None, None, cache)
    assert len(steps) == 4
    assert output.past_key_values is cache
    assert cache.get_seq_length() == 25


@pytest.mark.parametrize(
    "more",
    [{"output_hidden_states": True}, {"use_cache": False}, {"return_dict": False}],
    ids=lambda more: next(iter(more)),
)
def test_what_gives_more_than_logits_is_left_to_the_model(more, steps):
    one, tokens = model(), prompt(30)[0]
    with small("rkv").attach(one, graph=True) as attachment, torch.no_grad():
        cache = attachment.cache()
        fed(one, cache, tokens, 20, 21, 22)
        assert len(steps) == 1
        one(tokens[:, 22:23], past_key_values=cache, **more)
        assert len(steps) == 1
        fed(one, cache, tokens, 24, 25, 26)
    assert len(steps) == 1 + 2


def test_gradients_are_left_to_the_model(steps):
    one, tokens = build(), prompt(30)[0]
    with small("rkv").attach(one, graph=True) as attachment:
        cache = attachment.cache()
        fed(one, cache, tokens, 20, 21)
        assert one(tokens[:, 21:22], past_key_values=cache).logits.requires_grad
    assert not steps


def test_a_pad_among_decoded_tokens_is_left_to_the_model(steps):
    found = []
    tokens, mask = prompt(30, 30)[0], torch.ones(2, 30, dtype=torch.long)
    mask[1, 26] = 0
    for graph in (False, True):
        with small("rkv").attach(model(), graph=graph) as attachment, torch.no_grad():
            cache = attachment.cache()
            found.append(
                [
                    model()(tokens[:, begin:end], attention_mask=mask[:, :end], past_key_values=cache).logits[:, -1]
                    for begin, end in itertools.pairwise([0, 20, *range(21, 31)])
                ]
            )
    assert len(steps) == 5 + 3  # before the pad and after it
    assert (torch.stack(found[0]) - torch.stack(found[1])).abs().max() <= TOLERANCE


def test_nan_is_counted_and_said(steps):
    one = build()
    with small("rkv").attach(one, graph=True) as attachment, torch.no_grad():
        cache, tokens = attachment.cache(), prompt(30)[0]
        fed(one, cache, tokens, 20, 21, 22)
        steps[0].layers[1].slots.keys[0, :, 3, 0] = torch.nan
        with pytest.warns(NonFiniteScoreWarning, match="scores are NaN"):
            fed(one, cache, tokens, *range(23, 27))


REFUSED = {
    "allocate.heads": small("adakv"),
    "compress.every": small("snapkv", every="never"),
    "budget": small("snapkv", budget="10%"),
    "merge": small("d2o"),
    "store": small("snapkv", store={"use": "fp8"}),
    "read": small("snapkv", read={"use": "pages", "page": 4, "budget": 8}),
}


@pytest.mark.parametrize("place", REFUSED)
def test_what_fixed_shapes_cannot_serve_is_refused_before_anything_changes(place):
    one = build()
    before = fingerprint.of_model(one)
    with pytest.raises(PolicyError, match="graph: ") as raised:
        REFUSED[place].attach(one, graph=True)
    assert [problem.where for problem in raised.value.problems] == [place]
    assert fingerprint.of_model(one) == before


def test_a_model_with_sliding_layers_is_refused():
    with pytest.raises(UnsupportedModelError, match="sliding window"):
        small("snapkv").attach(model("gemma3"), graph=True)


@pytest.mark.parametrize("graph", ["reduce-overhead", 1, "", ("compile",)])
def test_another_way_to_run_steps_is_refused(graph):
    with pytest.raises(ParameterError, match="graph"):
        small("snapkv").attach(model(), graph=graph)


def test_a_detached_model_is_as_it_was(steps):
    one = build()
    before = fingerprint.of_model(one)
    with small("snapkv").attach(one, graph=True):
        assert fingerprint.of_model(one) != before
        generate(one, *prompt(30, 20))
    assert fingerprint.of_model(one) == before
    assert steps


def test_the_forward_that_somebody_else_had_put_there_is_used_and_comes_back(steps):
    one, calls = build(), []
    own = one.forward

    def forward(*args, **call):
        calls.append(1)
        return own(*args, **call)

    one.forward = forward
    with small("snapkv").attach(one, graph=True):
        output = generate(one, *prompt(30, 20))
    assert one.forward is forward
    assert len(calls) == 24
    assert len(steps) == 22
    assert output.sequences.shape == (2, 54)


def test_a_cache_goes_on_after_its_attachment(steps):
    one, tokens = build(), prompt(40)[0]
    with small("snapkv").attach(one, graph=True) as attachment, torch.no_grad():
        cache = attachment.cache()
        fed(one, cache, tokens, 20, *range(21, 26))
    assert steps
    assert cache.get_seq_length() == 25
    assert max(held(cache)[0][0][0]) == 24
    cache.check_integrity()


def test_a_copy_of_an_attached_model_serves_its_own_steps(steps):
    one = build()
    with small("snapkv").attach(one, graph=True):
        expected = generate(one, *prompt(30, 20))
        other = copy.deepcopy(one)
    found = generate(other, *prompt(30, 20))
    assert torch.equal(expected.sequences, found.sequences)
    assert len({id(session) for session in steps}) == 2
    assert steps[-1]._step.forward.__self__ is other


def test_other_weights_have_another_storage(steps):
    one = build()
    with small("snapkv").attach(one, graph=True):
        generate(one, *prompt(30))
        one.load_state_dict(build(seed=1).state_dict(), assign=True)
        generate(one, *prompt(30))
    assert len({id(session) for session in steps}) == 2


def test_a_step_that_fails_leaves_a_cache_that_nobody_can_go_on_with(steps, monkeypatch):
    one, tokens = model(), prompt(40)[0]
    with small("snapkv").attach(one, graph=True) as attachment, torch.no_grad():
        cache = attachment.cache()
        fed(one, cache, tokens, 20, 21, 22)
        with monkeypatch.context() as broken:
            broken.setattr(steps[0]._step, "forward", lambda **_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                one(tokens[:, 22:23], past_key_values=cache)
        with pytest.raises(KVPolicyError, match="failed"):
            one(tokens[:, 22:23], past_key_values=cache)
        assert generate(one, tokens[:, :20]).sequences.shape == (1, 44)


@attrs.frozen
class Fewer(Selector):
    """Keeps one entry less than it should."""

    name = "fewer"

    def select(self, scores, candidates, counts):
        return TopK().select(scores, candidates, counts - 1)


def test_a_plugin_that_keeps_another_count_is_found_out(steps):
    policy = small("snapkv")
    policy = attrs.evolve(policy, spec=attrs.evolve(policy.spec, select=Fewer()))
    with policy.attach(model(), graph=True) as attachment:
        cache = attachment.cache()
        fed(model(), cache, prompt(40)[0], 20, *range(21, 30))
        with pytest.raises(CacheError, match="instead of"):
            held(cache)
    assert steps


@attrs.frozen
class Bump(LayerAllocator):
    """Gives the first layer more while a sequence has some lengths."""

    name = "bump"

    def allocate(self, request):
        extra = 6 if 40 <= request.length < 50 else 0
        return (request.budget + extra, request.budget - extra, request.budget)


def test_entries_that_outgrow_the_storage_get_a_larger_one(steps):
    policy = small("snapkv")
    allocate = attrs.evolve(policy.spec.allocate, layers=Bump())
    policy = attrs.evolve(policy, spec=attrs.evolve(policy.spec, allocate=allocate))
    assert_alike(policy, model(), *prompt(30), count=40)
    assert len({id(session) for session in steps}) == 2
    assert [session.capacities for session in dict.fromkeys(steps)] == [(16, 16, 16), (22, 16, 16)]


def test_inference_mode_and_no_grad_share_a_storage(steps):
    one = build()
    with small("snapkv").attach(one, graph=True), torch.inference_mode():
        expected = generate(one, *prompt(30, 20))
        with torch.inference_mode(mode=False):
            found = generate(one, *prompt(30, 20))
    assert torch.equal(expected.sequences, found.sequences)
    assert len(set(map(id, steps))) == 1


def test_the_page_on_it_runs(capsys, steps):
    page = Path(__file__).parents[2] / "docs" / "how-to" / "static-shapes.md"
    block = page.read_text("utf-8").split("```python\n")[1].split("```")[0]

    exec(block, {})  # noqa: S102 our own page

    assert "policy rkv" in capsys.readouterr().out
    assert len(steps) == 30
