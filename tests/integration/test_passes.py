"""Prompts that are read again before they are compressed: when, by which rows, and that nothing else is left of it."""

import copy

import attrs
import pytest
import torch

from kvpolicy.errors import ParameterError, PolicyError, UnsupportedCallError, UnsupportedModelError
from kvpolicy.spec.policy import Weighted
from tests.support import fingerprint
from tests.support.alone import assert_rows_alone
from tests.support.decisions import Decisions
from tests.support.models import build, difference, generate, model, prompt
from tests.support.policies import held, small
from tests.support.rereading import Reread, forwards, read, rereading
from tests.support.rounding import close
from tests.support.states import assert_same_state, reachable

TOKENS, _ = prompt(30)
CHUNKS = 6  # of 5 tokens


def stages(**overrides):
    """Policies whose entries are held in different ways."""
    return {
        "even": lambda: rereading(**overrides),
        "ragged": lambda: rereading(allocate={"heads": {"use": "adaptive", "floor": 0.1}}, **overrides),
        "joint": lambda: rereading(allocate={"joint": {"use": "global"}}, **overrides),
        "merging": lambda: rereading(merge={"use": "d2o"}, **overrides),
        "packing": lambda: rereading(
            store={"use": "kivi", "bits": 4, "group": 4, "residual": 4, "batch": 4}, **overrides
        ),
        "pages": lambda: rereading(read={"use": "pages", "page": 4, "budget": 8, "dense_first": 0}, **overrides),
    }


@pytest.fixture
def counted():
    """A model, and the arguments of all its forwards so far."""
    one = build()
    seen, handle = forwards(one)
    yield one, seen
    handle.remove()


# -- when ------------------------------------------------------------------------------------------------------


def test_each_pass_is_one_forward_and_decode_steps_have_none(counted):
    one, seen = counted
    with rereading().attach(one):
        generate(one, TOKENS, count=20)
    assert [call["input_ids"].shape[1] for call in seen] == [30, *[5] * CHUNKS, *[1] * 19]
    for call, start in zip(seen[1 : 1 + CHUNKS], range(0, 30, 5), strict=True):
        assert torch.equal(call["input_ids"], TOKENS[:, start : start + 5])
        assert call["logits_to_keep"] == 1


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_budget_that_holds_everything_needs_no_pass_and_gives_the_bits_of_the_plain_model(architecture):
    one = build(architecture)
    plain = generate(one, TOKENS)
    seen, _ = forwards(one)
    with rereading(budget=200).attach(one):
        attached = generate(one, TOKENS)
    assert difference(attached, plain) == 0
    assert len(seen) == 24


@pytest.mark.parametrize("policy", stages().values(), ids=stages())
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_logits_of_the_prompt_are_those_of_the_plain_model(architecture, policy):
    one = build(architecture)
    tokens, mask = prompt(30, 22, 30)
    plain = one(tokens, attention_mask=mask).logits
    with policy().attach(one) as attachment:
        attached = read(one, attachment.cache(), tokens, mask)
    assert torch.equal(attached[mask.bool()], plain[mask.bool()])


def test_rows_that_hold_no_more_than_their_budget_have_no_passes(counted):
    """Their entries keep the state that new ones have; a batch in which none holds more has no passes at all."""
    one, seen = counted
    tokens, mask = prompt(30, 9)
    with rereading().attach(one) as attachment:
        cache = attachment.cache()
        read(one, cache, tokens, mask)
        column = cache.managed[0].storage.slots
        assert column.segment("score[0].most", 0, 0).min() > 0
        assert column.segment("score[0].most", 1, 0).tolist() == [0] * 9
        assert len(seen) == 1 + CHUNKS
        read(one, attachment.cache(), tokens[1:, -9:])
        assert len(seen) == 2 + CHUNKS


def test_what_fitted_into_the_budget_is_read_with_the_next_prompt(counted):
    """A first turn, its answer and a second turn: none of it is left without a score for being short."""
    one, seen = counted
    with rereading().attach(one) as attachment:
        cache = attachment.cache()
        read(one, cache, TOKENS[:, :8])
        for step in (8, 9):
            read(one, cache, TOKENS[:, step : step + 1])
        assert len(seen) == 3
        read(one, cache, TOKENS[:, 10:20])
        assert torch.cat([call["input_ids"] for call in seen[4:]], 1).equal(TOKENS[:, :20])
        del seen[:]
        read(one, cache, TOKENS[:, 20:])
        assert torch.cat([call["input_ids"] for call in seen[1:]], 1).equal(TOKENS[:, 20:])


@pytest.mark.parametrize("size", [1, 7, 29, 30])
@pytest.mark.parametrize("policy", stages().values(), ids=stages())
def test_a_prompt_in_chunks_is_read_when_its_last_chunk_has_come(policy, size):
    """`generate` says where the prompt ends: nothing of it is compressed before, and the result is that of one."""
    one, decisions = build(), Decisions()
    seen, _ = forwards(one)
    with policy().attach(one) as attachment:
        whole, parts = attachment.cache(), attachment.cache()
        with decisions.watched():
            expected = generate(one, TOKENS, past_key_values=whole, count=8)
        del seen[:]
        with decisions.followed():
            found = generate(one, TOKENS, past_key_values=parts, count=8, prefill_chunk_size=size)
        parts.check_integrity()
        assert held(parts) == held(whole)
    chunks = -(-30 // size)
    assert [call["input_ids"].shape[1] for call in seen][chunks:] == [*[5] * CHUNKS, *[1] * 7]
    assert all(close(own, theirs) for own, theirs in zip(found.logits, expected.logits, strict=True))


def test_whoever_chunks_a_prompt_says_where_it_ends(counted):
    """Else every forward of more than one token is a prompt by itself."""
    one, seen = counted
    with rereading().attach(one) as attachment:
        cache = attachment.cache()
        cache.expect_prompt(30)
        for start in (0, 13, 26):
            assert cache.managed[0].entries in ([], [2 * start])
            read(one, cache, TOKENS[:, start : min(start + 13, 30)])
        assert [call["input_ids"].shape[1] for call in seen] == [13, 13, 4, *[5] * CHUNKS]
        assert cache.managed[0].entries == [24]
        del seen[:]
        cache = attachment.cache()
        for start in (0, 13, 26):
            read(one, cache, TOKENS[:, start : min(start + 13, 30)])
        assert [call["input_ids"].shape[1] for call in seen] == [13, 5, 5, 3, 13, 5, 5, 3, 4, 4]


def test_a_prompt_that_was_undone_in_part_is_read_as_it_is_then(counted):
    one, seen = counted
    with rereading().attach(one) as attachment:
        cache = attachment.cache()
        cache.expect_prompt(30)
        read(one, cache, TOKENS[:, :20])
        cache.crop(-6)
        read(one, cache, TOKENS[:, :16])
        assert torch.cat([call["input_ids"] for call in seen[2:]], 1).equal(
            torch.cat([TOKENS[:, :14], TOKENS[:, :16]], 1)
        )


# -- rows ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", stages().values(), ids=stages())
def test_every_row_gives_what_it_gives_alone(policy):
    one = build()
    tokens, mask = prompt(33, 21, 9)
    with policy().attach(one) as attachment:
        decisions = assert_rows_alone(one, attachment, tokens, mask)
    assert decisions.repeated


def test_rows_of_a_model_with_a_sliding_window_give_what_they_give_alone():
    one = build("gemma3")
    tokens, mask = prompt(33, 21, 40)
    with rereading().attach(one) as attachment:
        assert_rows_alone(one, attachment, tokens, mask)


def test_pads_behind_the_tokens_of_a_row_are_not_read(counted):
    """A second turn that is shorter for one row, padded on either side."""
    one, seen = counted
    tokens, _ = prompt(42, 42)
    with rereading().attach(one) as attachment:
        for left in (True, False):
            del seen[:]
            cache, mask = attachment.cache(), torch.ones(2, 42, dtype=torch.long)
            mask[1, slice(30, 34) if left else slice(38, 42)] = 0
            read(one, cache, tokens[:, :30], mask[:, :30])
            read(one, cache, tokens[:, 30:], mask)
            passes = seen[2 + CHUNKS :]
            assert [call["attention_mask"][:, 42:].sum(1).tolist() for call in passes] == [[5, 5], [5, 3], [2, 0]]
            real = tokens[1, 34:] if left else tokens[1, 30:38]
            assert torch.cat([call["input_ids"][1] for call in passes])[:8].equal(real)


def test_positions_go_on_from_those_of_the_prompt(counted):
    one, seen = counted
    tokens, mask = prompt(30, 22)
    with rereading().attach(one):
        generate(one, tokens, mask, count=2)
    assert seen[1]["position_ids"].tolist() == [[30, 31, 32, 33, 34], [22, 23, 24, 25, 26]]


# -- what is left of it ----------------------------------------------------------------------------------------


@attrs.frozen
class Forgetful(Reread):
    """Reads prompts again, and scores by position."""

    name = "forgetful"

    def observe_pass(self, query_logits, state):
        return {}

    def score(self, view):
        return view.positions.float()


@attrs.frozen
class Silent(Forgetful):
    """Asks for no pass."""

    name = "silent"

    def passes(self, prompt):
        return ()


@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
@pytest.mark.parametrize("policy", stages().values(), ids=stages())
def test_nothing_but_what_its_scorer_remembers_is_left_of_a_pass(architecture, policy):
    """Window, attention mass, followed queries, lengths, layers with a window: as if there had been no passes."""
    one, caches = build(architecture), []
    beside = [{"use": "attention", "queries": 4}, {"use": "accumulated_attention", "weight": 0.1}]
    tokens, mask = prompt(30, 22)
    for scorer in (Forgetful(), Silent()):
        made = policy()
        spec = attrs.evolve(made.spec, score=(*small("snapkv", score=beside).spec.score, Weighted(scorer)))
        with attrs.evolve(made, spec=spec).attach(one) as attachment:
            caches.append(attachment.cache())
            read(one, caches[-1], tokens, mask)
            read(one, caches[-1], tokens[:, :9])
            read(one, caches[-1], tokens[:, :1])
    assert_same_state(*caches)
    assert any("_sliding" in path for path in dict(reachable(caches[0]))) == (architecture == "gemma3")


@pytest.mark.parametrize("training", [False, True])
def test_the_model_is_as_it_was(training):
    """Dropout is off in a pass; counters that a module keeps are put back, and so are random numbers."""
    one = build(attention_dropout=0.5).train(training)
    layer = one.model.layers[0].mlp
    layer.register_buffer("calls", torch.zeros(()), persistent=False)
    layer.register_forward_hook(_count)
    with rereading().attach(one) as attachment:
        before, state, modes = fingerprint.of_model(one), torch.get_rng_state(), []
        one.model.norm.register_forward_hook(lambda module, *_: modes.append(module.training))
        cache = attachment.cache()
        torch.manual_seed(0)
        read(one, cache, TOKENS)
        drawn = torch.rand(3)
        torch.manual_seed(0)
        one(TOKENS, use_cache=False)
        assert torch.equal(drawn, torch.rand(3))
        assert modes == [training, *[False] * CHUNKS, training]
        assert layer.calls == 2
        assert one.training == training
        torch.set_rng_state(state)
        one.model.norm._forward_hooks.clear()
        assert fingerprint.of_model(one) == before


def _count(module, *_):
    module.calls += 1


def test_a_pass_computes_no_gradients_whatever_the_caller_does():
    one = build()
    with rereading().attach(one) as attachment:
        seen = []
        one.model.norm.register_forward_hook(lambda *_: seen.append(torch.is_grad_enabled()))
        one(TOKENS, past_key_values=attachment.cache())
    assert seen == [True, *[False] * CHUNKS]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_modes_of_the_caller(mode):
    one = build()
    with rereading().attach(one) as attachment:
        caches = [attachment.cache(), attachment.cache()]
        read(one, caches[0], TOKENS)
        with mode():
            one(TOKENS, past_key_values=caches[1])
        for cache in caches:
            read(one, cache, TOKENS[:, :9])
    assert_same_state(*caches)


def test_all_layers_hold_the_prompt_and_the_longest_pass_until_the_passes_are_over():
    one = build()
    with rereading().attach(one) as attachment:
        cache = attachment.cache()
        read(one, cache, TOKENS)
        slot = 2 * (2 * 8 * 4 + 4 + 4)  # of both heads: key and value of 8 floats, position and state
        for layer in attachment.report().layers:
            assert layer.peak_entry_bytes == 35 * slot
            assert layer.entry_bytes == 16 * slot
            assert layer.held == 12


def test_ids_that_wait_to_be_read_are_counted():
    one = build()
    with rereading().attach(one) as attachment:
        cache = attachment.cache()
        read(one, cache, TOKENS[:, :8])
        assert attachment.report().parts["state"] == 8 * 8
        read(one, cache, TOKENS)
        assert attachment.report().parts["state"] == 0


# -- caches go on ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("first", [8, 30])
def test_forked_saved_copied_and_moved_caches_go_on(first, tmp_path, counted):
    """Ids that no pass has read come along."""
    one, seen = counted
    tokens, mask = prompt(first, first - 3)
    more, _ = prompt(14, 14, seed=3)
    with rereading().attach(one) as attachment:
        cache = attachment.cache()
        read(one, cache, tokens, mask)
        cache.save(tmp_path / "prefix")
        moved = cache.fork()
        moved.reorder_cache(torch.tensor([1, 0]))
        moved.batch_select_indices(torch.tensor([1, 0]))
        others = {
            "fork": cache.fork(),
            "rows": cache.fork([0, 1]),
            "loaded": attachment.load_cache(tmp_path / "prefix"),
            "copy": copy.deepcopy(cache),
            "moved": moved,
        }
        full = torch.cat([mask, torch.ones_like(more)], 1)
        del seen[:]
        expected = read(one, cache, more, full)
        own = [call["input_ids"] for call in seen]
        for name, other in others.items():
            del seen[:]
            assert torch.equal(read(one, other, more, full), expected), name
            assert all(torch.equal(*pair) for pair in zip([call["input_ids"] for call in seen], own, strict=True)), name
            other.check_integrity()
            assert_same_state(cache, other)


def test_a_cache_that_was_reset_starts_anew(counted):
    one, seen = counted
    with rereading().attach(one) as attachment:
        cache, other = attachment.cache(), attachment.cache()
        read(one, cache, TOKENS[:, :9])
        cache.reset()
        del seen[:]
        read(one, cache, TOKENS)
        assert len(seen) == 1 + CHUNKS
        read(one, other, TOKENS)
        assert_same_state(cache, other)


def test_beams_and_several_answers():
    one = build()
    with rereading().attach(one) as attachment:
        alone = generate(one, TOKENS, count=8)
        several = generate(one, TOKENS.repeat(2, 1), count=8)
        beams = generate(one, TOKENS, count=8, num_beams=3, num_return_sequences=2)
        assert torch.equal(several.sequences, alone.sequences.repeat(2, 1))
        assert beams.sequences.shape == (2, 38)
        assert max(layer.held for layer in attachment.report().layers) < 16


def test_steps_of_fixed_shapes_go_on_behind_the_prompt(steps):
    one, other = build(), build()
    with rereading().attach(one):
        expected = generate(one, TOKENS)
    with rereading().attach(other, graph=True):
        found = generate(other, TOKENS)
    assert len(steps) > 15
    assert all(close(*pair) for pair in zip(found.logits, expected.logits, strict=True))


def test_single_tokens_of_a_prompt_are_no_steps_of_fixed_shapes(steps):
    """A second turn that comes token by token is read again as a whole, whatever has been decoded before."""
    found = []
    for graph in (False, True):
        with rereading().attach(build(), graph=graph) as attachment, torch.no_grad():
            model, cache = attachment.model, attachment.cache()
            generate(model, TOKENS, past_key_values=cache)
            decoded, end = len(steps), cache.get_seq_length() + 4
            cache.expect_prompt(end)
            turn = [model(TOKENS[:, [place]], past_key_values=cache).logits for place in range(4)]
            assert len(steps) == decoded
            assert cache.get_seq_length() == end
            found.append((turn, held(cache)))
    assert decoded > 15
    assert all(close(*pair) for pair in zip(found[0][0], found[1][0], strict=True))
    assert found[0][1] == found[1][1]


@attrs.frozen
class Noting(Reread):
    """Keeps the prompts that it is asked about in a list that is its parameter."""

    name = "noting"

    asked: list = attrs.field(factory=list, eq=False)

    def passes(self, prompt):
        self.asked.append(prompt)
        return super().passes(prompt)


def test_a_scorer_is_told_what_is_protected_and_where_a_prompt_starts():
    scorer, tokens = Noting(), prompt(40)[0]
    protect = {"sinks": 2, "recent": 4, "regions": ["tools"]}
    with rereading(25, scorer=scorer, protect=protect).attach(build()) as attachment:
        cache = attachment.cache(regions={"tools": [(5, 7), (25, 40)]})
        read(attachment.model, cache, tokens[:, :30])
        read(attachment.model, cache, tokens[:, 30:31])
        read(attachment.model, cache, tokens[:, 31:])
    first, second = scorer.asked
    assert (first.start, second.start) == (0, 30)
    assert torch.equal(first.tokens, tokens[0, :30])
    assert torch.equal(second.tokens, tokens[0, 30:])
    assert first.protected.nonzero().flatten().tolist() == [0, 1, 5, 6, *range(25, 30)]
    assert second.protected.nonzero().flatten().tolist() == [0, 1, 5, 6, *range(25, 40)]


# -- what cannot be had ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["lookup", "model"])
def test_assisted_decoding_is_refused_before_anything_has_changed(way):
    one = build()
    options = {"lookup": {"prompt_lookup_num_tokens": 3}, "model": {"assistant_model": build(seed=1)}}[way]
    with rereading().attach(one) as attachment:
        cache = attachment.cache()
        with pytest.raises(UnsupportedCallError, match=r"score: reread reads prompts again .* without an assistant"):
            generate(one, TOKENS, past_key_values=cache, **options)
        assert cache.get_seq_length() == 0
        read(one, cache, TOKENS)


def embedded(one, tokens):
    return one.get_input_embeddings()(tokens)


UNKNOWN = {
    "embeddings": (lambda one: {"inputs_embeds": embedded(one, TOKENS)}, r"inputs_embeds; give .*tokens=\.\.\."),
    "an image": (lambda one: {"input_ids": TOKENS, "pixel_values": torch.zeros(1, 3)}, r"pixel_values; give .*tokens"),
    "a mask of pairs": (
        lambda one: {"input_ids": TOKENS, "attention_mask": torch.ones(1, 1, 30, 30, dtype=torch.bool).tril()},
        r"attention_mask must be \[rows, tokens\]",
    ),
    "nothing": (lambda one: {}, "must have input_ids or inputs_embeds"),
}


@pytest.mark.parametrize(("call", "message"), UNKNOWN.values(), ids=UNKNOWN)
def test_a_prompt_whose_tokens_are_not_known_is_refused_before_anything_has_changed(call, message):
    one = build()
    with rereading().attach(one) as attachment, torch.no_grad():
        cache = attachment.cache()
        with pytest.raises(UnsupportedCallError, match=message):
            one(past_key_values=cache, **call(one))
        assert cache.get_seq_length() == 0
        read(one, cache, TOKENS)
        assert held(cache)[0][0][0] != list(range(30))


def test_what_the_budget_holds_need_not_be_known():
    one = build()
    with rereading(budget=60).attach(one) as attachment, torch.no_grad():
        cache = attachment.cache()
        plain = one(inputs_embeds=embedded(one, TOKENS), use_cache=False).logits
        assert torch.equal(one(inputs_embeds=embedded(one, TOKENS), past_key_values=cache).logits, plain)
        read(one, cache, TOKENS[:, :1])
        with pytest.raises(UnsupportedCallError, match="token ids"):
            one(inputs_embeds=embedded(one, prompt(40)[0]), past_key_values=cache)
        read(one, cache, prompt(40)[0])


@pytest.mark.parametrize("way", ["forward", "generate"])
@pytest.mark.parametrize("shape", ["rows", "one row", "flat"])
def test_tokens_may_be_given_with_the_cache(shape, way):
    one = build()
    tokens = TOKENS.repeat(2, 1)
    given = {"rows": tokens, "one row": TOKENS, "flat": TOKENS[0]}[shape]
    with rereading().attach(one) as attachment, torch.no_grad():
        known, cache = attachment.cache(), attachment.cache(tokens=given)
        if way == "forward":
            read(one, known, tokens)
            one(inputs_embeds=embedded(one, tokens), past_key_values=cache)
        else:
            generate(one, tokens, past_key_values=known, count=6)
            one.generate(inputs_embeds=embedded(one, tokens), past_key_values=cache, max_new_tokens=6, do_sample=False)
        assert held(cache) == held(known)


def test_tokens_that_are_none_are_refused():
    one = build()
    with rereading().attach(one) as attachment, torch.no_grad():
        for given in ([1, 2], torch.zeros(3), torch.zeros(1, 0, dtype=torch.long), torch.tensor([-1]), torch.tensor(1)):
            with pytest.raises(ParameterError, match="tokens must be ids"):
                attachment.cache(tokens=given)
        cache = attachment.cache(tokens=TOKENS.repeat(3, 1))
        with pytest.raises(UnsupportedCallError, match="tokens of 3 rows were given with the cache, the forward has 2"):
            read(one, cache, TOKENS.repeat(2, 1))
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize("called", ["part", "compiled"])
def test_a_forward_that_the_attachment_does_not_see_is_refused(called):
    one = build()
    with rereading().attach(one) as attachment, torch.no_grad():
        cache = attachment.cache()
        forward = one.model if called == "part" else torch.compile(one, backend="eager")
        with pytest.raises(UnsupportedCallError, match="call the model that the policy is attached to"):
            forward(TOKENS, past_key_values=cache)
        assert cache.get_seq_length() == 0
        read(one, cache, TOKENS)


def test_a_policy_that_does_not_compress_prompts_is_refused():
    with pytest.raises(PolicyError, match=r"compress\.prefill: must be true: reread reads a prompt again"):
        rereading(compress={"prefill": False}).attach(build())


def test_fixed_shapes_ask_what_they_ask_of_all_policies():
    with pytest.raises(UnsupportedModelError, match="sliding window"):
        rereading().attach(build("gemma3"), graph=True)


def test_two_scorers_read_their_own_passes(counted):
    one, seen = counted
    made = rereading()
    spec = attrs.evolve(made.spec, score=(Weighted(Reread(5)), Weighted(Forgetful(10), weight=0.0)))
    with attrs.evolve(made, spec=spec).attach(one) as attachment, rereading().attach(build()) as alone:
        caches = [attachment.cache(), alone.cache()]
        read(one, caches[0], TOKENS)
        read(alone.model, caches[1], TOKENS)
        assert [call["input_ids"].shape[1] for call in seen] == [30, *[5] * 6, *[10] * 3]
        assert model() is not one
        assert held(caches[0]) == held(caches[1])
