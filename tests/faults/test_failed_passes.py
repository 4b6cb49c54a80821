"""What fails while a prompt is read again leaves a cache that refuses to go on, and a model that is as it was."""

import contextlib
import copy

import attrs
import pytest
import torch

from kvpolicy.errors import CacheError, PluginContractError
from kvpolicy.stages import Pass
from kvpolicy_plugins.scorers.attention_based.reconstruction import Reconstruction
from tests.support import fingerprint
from tests.support.interrupts import Interrupts
from tests.support.models import build, prompt
from tests.support.rereading import Reread, read, rereading

TOKENS, _ = prompt(40)
WEIGHED = Reconstruction(5, 0, "output_norm")


@contextlib.contextmanager
def failing_at(module, call, error):
    """The module raises when it is called for this time."""
    calls = []

    def count(*_given):
        calls.append(None)
        if len(calls) == call:
            raise error("on purpose")

    handle = module.register_forward_pre_hook(count)
    try:
        yield
    finally:
        handle.remove()


def parts(one):
    """From the first layer to what is behind the last."""
    return [one.model.layers[0].self_attn, one.model.layers[1].mlp, one.model.norm, one.lm_head]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_a_pass_that_fails_leaves_a_cache_that_refuses(architecture, error):
    one = build(architecture)
    with rereading().attach(one) as attachment:
        new = attachment.cache()
        expected = read(one, new, TOKENS), read(one, new, TOKENS[:, :9])
        before = fingerprint.of_model(one)
        for part in parts(one):
            for call in (2, 5, 9):  # the first is that of the prompt, the last that of the last pass
                cache = attachment.cache()
                with pytest.raises(error), failing_at(part, call, error):
                    read(one, cache, TOKENS)
                assert fingerprint.of_model(one) == before
                for change in (lambda c: read(one, c, TOKENS), lambda c: c.crop(-1), lambda c: c.fork()):
                    with pytest.raises(CacheError, match="failed"):
                        change(cache)
                cache.reset()
                assert torch.equal(read(one, cache, TOKENS), expected[0])
                assert torch.equal(read(one, cache, TOKENS[:, :9]), expected[1])


def test_a_prompt_that_fails_itself_has_no_passes():
    one = build()
    with rereading().attach(one) as attachment:
        cache, seen = attachment.cache(), []
        one.register_forward_pre_hook(lambda *_: seen.append(None))
        with pytest.raises(torch.OutOfMemoryError), failing_at(one.lm_head, 1, torch.OutOfMemoryError):
            read(one, cache, TOKENS)
        assert len(seen) == 1


def test_a_forward_that_was_refused_leaves_nothing_to_be_read():
    one = build()
    with rereading().attach(one) as attachment:
        cache, other = attachment.cache(), attachment.cache()
        with pytest.raises(IndexError):
            read(one, cache, torch.full((1, 20), 10**6))
        read(one, cache, TOKENS[:, :9])
        read(one, other, TOKENS[:, :9])
        assert torch.equal(read(one, cache, TOKENS), read(one, other, TOKENS))
        assert torch.equal(cache.prompt.unread([0])[0], other.prompt.unread([0])[0])


def test_a_layer_that_a_pass_leaves_out_is_found():
    """As where a module decides by itself when it runs."""
    one = build()
    with rereading().attach(one) as attachment:
        cache, layers = attachment.cache(), one.model.layers

        def shorten(module, _args, _output):
            module.layers = module.layers[:2]

        handle = one.model.register_forward_hook(shorten)
        with pytest.raises(CacheError, match="layer 2: a pass did not reach kvpolicy's attention in it"):
            read(one, cache, TOKENS)
        handle.remove()
        one.model.layers = layers
        with pytest.raises(CacheError, match="failed"):
            read(one, cache, TOKENS)


@attrs.frozen
class Odd(Reread):
    """Gives what it is told."""

    name = "odd"

    given: object = None
    state: object = None

    def passes(self, prompt):
        return super().passes(prompt) if self.given is None else self.given

    def observe_pass(self, query_logits, state):
        return super().observe_pass(query_logits, state) if self.state is None else self.state(query_logits, state)


def ids(*numbers):
    return torch.tensor(numbers, dtype=torch.int64)


WRONG = {
    "no list": (Odd(given=7), "gave 7 as `passes`, expected a list of up to"),
    "no pass": (Odd(given=[ids(3)]), "gave a list as `passes`"),
    "no tensor": (Odd(given=[Pass([3])]), "gave a pass of a list, expected token ids"),
    "floats": (Odd(given=[Pass(torch.ones(3))]), r"gave a pass of torch.float32 \[3\]"),
    "a batch": (Odd(given=[Pass(ids(3)[None])]), r"gave a pass of torch.int64 \[1, 1\]"),
    "empty": (Odd(given=[Pass(ids())]), r"gave a pass of torch.int64 \[0\]"),
    "negative": (Odd(given=[Pass(ids(3, -1))]), r"gave a pass of torch.int64 \[2\], expected token ids"),
    "not in the vocabulary": (Odd(given=[Pass(ids(3, 97))]), "gave a pass with token 97, expected ids below 97"),
    "no span": (Odd(given=[Pass(ids(3), 4)]), "gave a pass with spans 4"),
    "a span behind the prompt": (Odd(given=[Pass(ids(3), ((0, 41),))]), r"spans \(\(0, 41\),\), expected .* to 40"),
    "an empty span": (Odd(given=[Pass(ids(3), ((4, 4),))]), r"gave a pass with spans \(\(4, 4\),\)"),
    "unknown state": (Odd(state=lambda *_: {"x": ids(3)}), "returned state 'x', expected only"),
    "state of another shape": (Odd(state=lambda *_: {"most": torch.ones(1)}), r"returned shape \(1,\)"),
    "no state": (Odd(state=lambda *_: 3), "returned 3 as its state"),
}


@pytest.mark.parametrize(("scorer", "message"), WRONG.values(), ids=WRONG)
def test_what_a_scorer_gives_is_checked(scorer, message):
    one = build()
    before = None
    with rereading(scorer=scorer).attach(one) as attachment:
        before, cache = fingerprint.of_model(one), attachment.cache()
        with pytest.raises(PluginContractError, match=message):
            read(one, cache, TOKENS)
        assert fingerprint.of_model(one) == before
        with pytest.raises(CacheError, match="failed"):
            read(one, cache, TOKENS)


WRITING = {
    "logits": lambda seen, state: seen.logits.mul_(2),
    "own": lambda seen, state: seen.own.mul_(2),
    "most": lambda seen, state: state["most"].add_(1),
}


@pytest.mark.parametrize("name", WRITING)
def test_what_a_scorer_is_shown_stays_as_it_is(name, monkeypatch):
    monkeypatch.setenv("KVPOLICY_DEBUG", "1")

    def write(seen, state):
        WRITING[name](seen, state)
        return {}

    attachment = rereading(scorer=Odd(state=write)).attach(build())
    with pytest.raises(PluginContractError, match=f"changed its input '{name}'"):
        read(attachment.model, attachment.cache(), TOKENS)


def test_a_prompt_that_a_scorer_is_shown_stays_as_it_is(monkeypatch):
    monkeypatch.setenv("KVPOLICY_DEBUG", "1")

    class Writing(Odd):
        name = "writing"

        def passes(self, prompt):
            prompt.tokens[0] = 1
            return []

    attachment = rereading(scorer=attrs.frozen(Writing)()).attach(build())
    with pytest.raises(PluginContractError, match="changed its input 'tokens'"):
        read(attachment.model, attachment.cache(), TOKENS)


FAULTY = {
    "queries": (Reread(5), "self_attn.q_proj", torch.nan),
    "queries, weighed": (WEIGHED, "self_attn.q_proj", torch.nan),
    "hidden states": (WEIGHED, "input_layernorm", torch.inf),
    "keys and values of the pass": (WEIGHED, "self_attn.v_proj", torch.nan),
}


@pytest.mark.parametrize(("scorer", "part", "wrong"), FAULTY.values(), ids=FAULTY)
def test_a_row_with_faulty_logits_is_that_rows_fault(scorer, part, wrong):
    """NaN in a pass is shown as an entry that is not seen: no state becomes NaN, and the other row is not touched."""
    one = build()
    tokens = TOKENS[:, :30].repeat(2, 1)
    with rereading(scorer=scorer).attach(one) as attachment:
        caches = [attachment.cache(), attachment.cache()]
        read(one, caches[0], tokens)

        def spoil(module, args, output):
            if output.shape[1] == 5:
                output[1, 2] = wrong
            return output

        handle = one.model.layers[1].get_submodule(part).register_forward_hook(spoil)
        read(one, caches[1], tokens)
        handle.remove()
        for clean, spoilt in zip(*(cache.managed for cache in caches), strict=True):
            name = "score[0].most"
            for head in range(2):
                own, other = (layer.storage.slots.segment(name, 0, head) for layer in (clean, spoilt))
                assert torch.equal(own, other)
                assert spoilt.storage.slots.segment(name, 1, head).isfinite().all()


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_an_entry_whose_value_is_not_finite_is_worth_nothing(wrong):
    """To a scorer that weighs by values; what it remembers of all others stays what it is."""
    one = build()
    with rereading(budget=29, scorer=WEIGHED).attach(one) as attachment:
        caches = [attachment.cache(), attachment.cache()]
        read(one, caches[0], TOKENS[:, :30])

        def spoil(module, args, output):
            if output.shape[1] == 30:
                output[:, 7, :8] = wrong  # of the first KV head
            return output

        handle = one.model.layers[2].self_attn.v_proj.register_forward_hook(spoil)
        read(one, caches[1], TOKENS[:, :30])
        handle.remove()
        clean, spoilt = (cache.managed[2].view([0]) for cache in caches)
    assert 7 not in spoilt.positions[0, 0].tolist()
    for head in range(2):
        told, expected = (worth_by_position(view, head) for view in (spoilt, clean))
        assert len(told) == 29
        assert all(worth > 0 and worth == expected.get(position, worth) for position, worth in told.items())


def worth_by_position(view, head):
    """What a scorer remembers of each entry of a head."""
    positions, worth = view.positions[0, head].tolist(), view.slot_state["score[0].most"][0, head].tolist()
    return dict(zip(positions, worth, strict=True))


def trials(lines, most=60):
    """Lines spread over all that are run, the first and the last among them."""
    return sorted({round(place * (lines - 1) / (most - 1)) for place in range(most)})


@pytest.mark.parametrize("form", ["even", "ragged", "turn", "weighed"])
def test_after_an_interrupt_at_any_line_a_retry_is_exact_or_refused(form):
    one, refused = build(), 0
    overrides = {"allocate": {"heads": {"use": "adaptive", "floor": 0.1}}} if form == "ragged" else {}
    scorer = attrs.evolve(WEIGHED, chunk=20) if form == "weighed" else Reread(20)
    with rereading(scorer=scorer, **overrides).attach(one) as attachment:
        start = attachment.cache()
        if form == "turn":
            read(one, start, TOKENS)
        before = fingerprint.of_model(one)
        counting, undisturbed = Interrupts(), copy.deepcopy(start)
        read(one, copy.deepcopy(start), TOKENS)
        with counting:
            first = read(one, undisturbed, TOKENS)
        expected = read(one, undisturbed, TOKENS[:, :9])
        for line in trials(counting.count):
            cache = copy.deepcopy(start)
            with contextlib.suppress(KeyboardInterrupt), Interrupts(line):
                read(one, cache, TOKENS)
            assert fingerprint.of_model(one) == before, line
            try:
                if cache.get_seq_length() == start.get_seq_length():
                    assert torch.equal(read(one, cache, TOKENS), first), line
                assert torch.equal(read(one, cache, TOKENS[:, :9]), expected), line
            except CacheError:
                refused += 1
                cache.reset()
                read(one, cache, TOKENS)
    assert refused > 30
