"""The ways of generating that transformers offers, under a policy."""

import pytest
import torch
from transformers import TextStreamer
from transformers.generation.streamers import BaseStreamer

from kvpolicy.errors import UncompressedWarning, UnsupportedCallError
from tests.support.models import build, difference, generate, model, prompt
from tests.support.policies import held, small

WAYS = {
    "beams": {"num_beams": 3},
    "beams returned": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "num_return_sequences": 2},
    "top-k": {"do_sample": True, "top_k": 5, "temperature": 0.7},
    "penalty": {"repetition_penalty": 1.3},
    "chunked prefill": {"prefill_chunk_size": 16},
}
NAMES = ("snapkv", "h2o", "adakv")


def run(one, tokens, mask, **options):
    torch.manual_seed(0)
    return generate(one, tokens, mask, **options)


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_a_large_budget_gives_what_the_plain_model_gives(name, options):
    tokens, mask = prompt(40, 29)
    plain = run(model(), tokens, mask, **options)
    with small(name, budget=200).attach(model()):
        attached = run(model(), tokens, mask, **options)
    assert torch.equal(plain.sequences, attached.sequences)
    assert difference(plain, attached) == 0


@pytest.mark.parametrize("options", WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("name", NAMES)
def test_a_small_budget_bounds_every_way_of_generating(name, options):
    tokens, mask = prompt(40, 29)
    with small(name).attach(model()) as attachment:
        out = run(model(), tokens, mask, **options)
        report = attachment.report()
    assert out.sequences.shape[1] == 64
    assert all(layer.held <= 12 + 4 - 1 and layer.compressions for layer in report.layers)
    out.past_key_values.check_integrity()


def test_beams_carry_their_own_entries():
    """The beams that survive are those found when every beam's cache is made anew from its tokens."""
    tokens, _ = prompt(20)
    one = model()
    with small("streaming_llm", budget=12, every=1, protect={"sinks": 2, "recent": 9}).attach(one) as attachment:
        beams = generate(one, tokens, count=10, num_beams=3, num_return_sequences=3, output_scores=True)
        for sequence, score in zip(beams.sequences, beams.sequences_scores, strict=True):
            cache, total = attachment.cache(), 0.0
            with torch.no_grad():
                logits = one(tokens, past_key_values=cache).logits[0, -1]
                for token in sequence[20:]:
                    total += logits.log_softmax(-1)[token].item()
                    logits = one(token.reshape(1, 1), past_key_values=cache).logits[0, -1]
            assert total / 10 == pytest.approx(score.item(), abs=1e-4)


class _Collected(BaseStreamer):
    def __init__(self):
        self.tokens = []

    def put(self, value):
        self.tokens += value.reshape(-1).tolist()

    def end(self):
        self.tokens.append(None)


def test_a_streamer_gets_the_tokens_as_they_come():
    assert issubclass(TextStreamer, BaseStreamer)
    tokens, mask = prompt(40)
    streamer = _Collected()
    with small("snapkv").attach(model()):
        out = generate(model(), tokens, mask, streamer=streamer)
    assert streamer.tokens == [*out.sequences[0].tolist(), None]


@pytest.mark.parametrize("name", ["streaming_llm", "adakv"])
def test_a_prompt_in_chunks_is_compressed_after_each(name):
    tokens, mask = prompt(60, 35)
    with small(name).attach(model()) as attachment:
        generate(model(), tokens, mask, count=1, prefill_chunk_size=16)
        assert [layer.held for layer in attachment.report().layers] == [12.0] * 3
        assert all(layer.compressions > 1 for layer in attachment.report().layers)


def test_chunks_and_the_whole_prompt_leave_the_same_when_positions_alone_decide():
    tokens, _ = prompt(60)
    with small("streaming_llm", protect={"sinks": 2, "recent": 6}).attach(model()) as attachment:
        caches = [attachment.cache(), attachment.cache()]
        generate(model(), tokens, count=1, past_key_values=caches[0])
        generate(model(), tokens, count=1, past_key_values=caches[1], prefill_chunk_size=7)
    assert held(caches[0]) == held(caches[1])


def test_no_cache_is_said_and_gives_what_the_plain_model_gives():
    tokens, mask = prompt(40)
    plain = generate(model(), tokens, mask, count=4, use_cache=False)
    with small("snapkv").attach(model()), pytest.warns(UncompressedWarning, match="use_cache=False"):
        attached = generate(model(), tokens, mask, count=4, use_cache=False)
    assert torch.equal(plain.sequences, attached.sequences)


@pytest.mark.parametrize("kind", ["static", "offloaded", "offloaded_static", "quantized"])
def test_another_kind_of_cache_is_refused(kind):
    tokens, mask = prompt(40)
    with small("snapkv").attach(model()), pytest.raises(UnsupportedCallError, match=kind):
        generate(model(), tokens, mask, cache_implementation=kind)


def test_a_forward_without_the_cache_of_the_policy_is_said():
    tokens, _ = prompt(40)
    with torch.no_grad():
        plain = model()(tokens).logits
        with small("snapkv").attach(model()), pytest.warns(UncompressedWarning, match="past_key_values"):
            attached = model()(tokens, use_cache=True).logits
    assert torch.equal(plain, attached)


def test_training_goes_on_as_without_a_policy():
    tokens, _ = prompt(40)
    gradients = []
    for attach in (False, True):
        one = build().train()
        attachment = small("snapkv").attach(one) if attach else None
        one(tokens, labels=tokens, use_cache=False).loss.backward()
        gradients.append([parameter.grad for parameter in one.parameters()])
        if attachment:
            attachment.detach()
    assert all(torch.equal(left, right) for left, right in zip(*gradients, strict=True))


def test_hidden_states_and_scores_can_be_asked_for():
    tokens, mask = prompt(40)
    plain = generate(model(), tokens, mask, count=3, output_hidden_states=True, output_scores=True)
    with small("snapkv", budget=200).attach(model()):
        attached = generate(model(), tokens, mask, count=3, output_hidden_states=True, output_scores=True)
    for left, right in zip(plain.hidden_states, attached.hidden_states, strict=True):
        assert all(torch.equal(one, other) for one, other in zip(left, right, strict=True))
