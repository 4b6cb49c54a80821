"""What is measured of a group of cases is what the plain model, or the model with the policy attached, gives."""

import pytest
import torch
from transformers import GenerationConfig

import kvpolicy
from kvpolicy.evaluate.harness import measure
from kvpolicy.evaluate.harness.measure import GroupRun
from kvpolicy.evaluate.tasks.case import Answer, Continuation, Turn
from kvpolicy.evaluate.testbed.vocabulary import EOS, IDS, PAD, VOCABULARY
from tests.support.models import build, prompt
from tests.support.policies import small
from tests.testbed_training.tokenizer import build_tokenizer

STEP = 4
WORDS = 6
ROUNDING = 1e-4


@pytest.fixture(scope="module")
def model():
    """One that writes many different words."""
    one = build(vocab_size=len(VOCABULARY))
    one.generation_config = GenerationConfig(do_sample=False, pad_token_id=IDS[PAD], eos_token_id=None)
    return one


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


def ids(count, seed):
    return tuple(prompt(count, seed=seed)[0][0].tolist())


def text_after(length, seed=0, scored=14):
    return Continuation(ids(length, seed), ids(scored, 100 + seed))


def question_after(length, seed=0, asked=3, words=WORDS):
    return Answer(ids(length, seed), ids(asked, 200 + seed), words, {"letters": lambda text: float(len(text))})


def measured(model, tokenizer, cases, policy=None):
    """All cases in one group, with the full cache or under a policy."""
    run = GroupRun(model, tokenizer, cases, STEP)
    full = run.full()
    if policy is None:
        return full
    with kvpolicy.load("full").attach(model) as attachment:
        return run.under(policy.compile(model), attachment)


def values_of(found, case):
    return {name: numbers[case] for name, numbers in found.values.items()}


# -- predictions -----------------------------------------------------------------------------------------------


def plain_logits(model, case):
    """[t, V] of one forward over prompt and text, for every token of the text but the first."""
    tokens = torch.tensor([case.prompt + case.text])
    with torch.no_grad():
        return model(tokens, use_cache=False).logits[0, len(case.prompt) : -1].double()


def attached_logits(model, case, policy):
    """The same from the attached model, which is given the prompt, and then the text some tokens at a time."""
    given = torch.tensor([case.text[:-1]])
    with policy.attach(model) as attachment, torch.no_grad():
        cache = attachment.cache()
        model(torch.tensor([case.prompt]), past_key_values=cache)
        parts = [model(chunk, past_key_values=cache).logits[0] for chunk in given.split(STEP, 1)]
    return torch.cat(parts).double()


def oracle(ours, full, text):
    """Token by token, in float64."""
    kl, same, surprise = [], [], []
    for own, reference, token in zip(ours, full, text[1:], strict=True):
        p, q = torch.softmax(reference, 0), torch.softmax(own, 0)
        kl.append(float((p * (p / q).log()).sum()))
        same.append(int(p.argmax()) == int(q.argmax()))
        surprise.append(-float(q[token].log()))
    agreed = same.index(False) if False in same else len(same)
    count = len(same)
    return {"kl": sum(kl) / count, "top1": sum(same) / count, "agreed": agreed, "nll": sum(surprise) / count}


def test_the_full_cache_is_its_own_reference_and_predicts_as_the_plain_model(model, tokenizer):
    case = text_after(40)
    full = plain_logits(model, case)
    found = values_of(measured(model, tokenizer, [case]), 0)

    assert found == pytest.approx(oracle(full, full, case.text), abs=ROUNDING)
    assert (found["kl"], found["top1"], found["agreed"]) == (0, 1, 13)


@pytest.mark.parametrize("name", ["snapkv", "adakv"])
def test_a_budget_that_holds_everything_predicts_as_the_plain_model(model, tokenizer, name):
    case = text_after(40)
    full = plain_logits(model, case)
    found = values_of(measured(model, tokenizer, [case], small(name, budget=200)), 0)

    assert found == pytest.approx(oracle(full, full, case.text), abs=ROUNDING)


@pytest.mark.parametrize("name", ["streaming_llm", "snapkv", "h2o"])
def test_predictions_of_an_evicting_policy_are_those_of_the_attached_model(model, tokenizer, name):
    case, policy = text_after(40, seed=1), small(name)
    expected = oracle(attached_logits(model, case, policy), plain_logits(model, case), case.text)
    found = values_of(measured(model, tokenizer, [case], policy), 0)

    assert found == pytest.approx(expected, abs=ROUNDING)
    assert found["kl"] > 0.05
    assert found["top1"] < 1


def test_the_first_disagreement_is_counted_from_the_start_of_the_text(model, tokenizer):
    """Not within a chunk: two chunks come before the first eviction."""
    policy, cases = small("streaming_llm", budget=44), [text_after(40, seed) for seed in (1, 2)]
    found = measured(model, tokenizer, cases, policy)
    expected = [
        oracle(attached_logits(model, case, policy), plain_logits(model, case), case.text)["agreed"] for case in cases
    ]

    assert found.values["agreed"] == expected
    assert all(2 * STEP <= agreed < 13 for agreed in expected)


@pytest.mark.parametrize("policy", [None, small("snapkv")], ids=["full", "snapkv"])
def test_texts_that_share_a_prompt_give_what_each_gives_alone(model, tokenizer, policy):
    """Each is compared with its own reference; also where they are of different lengths."""
    shared = ids(40, 3)
    cases = [Continuation(shared, ids(count, seed)) for seed, count in ((4, 14), (5, 14), (6, 9))]
    together = measured(model, tokenizer, cases, policy)

    for place, case in enumerate(cases):
        alone = measured(model, tokenizer, [case], policy)
        assert values_of(together, place) == pytest.approx(values_of(alone, 0), abs=ROUNDING)


@pytest.mark.parametrize("policy", [None, small("streaming_llm")], ids=["full", "streaming_llm"])
def test_prompts_of_different_lengths_give_what_each_gives_alone(model, tokenizer, policy):
    """Pads in front of a shorter one are not seen, and positions do not count them."""
    cases = [text_after(40, 1), text_after(23, 2)]
    together = measured(model, tokenizer, cases, policy)

    for place, case in enumerate(cases):
        alone = values_of(measured(model, tokenizer, [case], policy), 0)
        assert values_of(together, place) == pytest.approx(alone, abs=ROUNDING)


def test_another_precision_is_compared_with_the_first(model, tokenizer):
    """The prompt is computed in the other precision, too."""
    case = text_after(40)
    other = build(vocab_size=len(VOCABULARY), dtype=torch.bfloat16)
    run = GroupRun(model, tokenizer, [case], STEP)
    run.full()
    found = values_of(run.in_precision(other), 0)
    tokens, logits = torch.tensor([case.prompt + case.text]), []
    with torch.no_grad():
        made = other(tokens[:, :40])
        for chunk in tokens[:, 40:-1].split(STEP, 1):
            made = other(chunk, past_key_values=made.past_key_values)
            logits.append(made.logits[0])
    expected = oracle(torch.cat(logits).double(), plain_logits(model, case), case.text)

    assert found == pytest.approx(expected, abs=ROUNDING)
    assert found["kl"] > 0


def test_prompts_of_another_precision_are_rounded_to_that_of_the_model(model, tokenizer):
    """The cache has the model's dtype, and the numbers are those of the other model up to the rounding of 16 bits."""
    case = text_after(40)
    narrow = build(vocab_size=len(VOCABULARY), dtype=torch.bfloat16)
    exact = build(vocab_size=len(VOCABULARY))
    run = GroupRun(narrow, tokenizer, [case], STEP, exact)
    found = values_of(run.full(), 0)
    own = values_of(measured(narrow, tokenizer, [case]), 0)

    assert {layer.keys.dtype for layer in run.prompts.layers} == {torch.bfloat16}
    assert found["nll"] == pytest.approx(own["nll"], abs=0.2)
    assert found["nll"] != own["nll"]


def test_prompts_that_the_other_precision_has_computed_are_not_computed_twice(model, tokenizer, monkeypatch):
    """And that precision's own numbers are those of its plain model."""
    case, computed = text_after(40), []
    narrow, exact = build(vocab_size=len(VOCABULARY), dtype=torch.bfloat16), build(vocab_size=len(VOCABULARY))
    trace = measure.trace_prompts
    monkeypatch.setattr(measure, "trace_prompts", lambda *given: computed.append(given[0]) or trace(*given))
    run = GroupRun(narrow, tokenizer, [case], STEP, exact)
    run.full()
    found = values_of(run.in_precision(exact), 0)
    run.in_precision(model)

    assert computed == [exact, model]
    assert found["nll"] == pytest.approx(values_of(measured(exact, tokenizer, [case]), 0)["nll"], abs=ROUNDING)


# -- answers ---------------------------------------------------------------------------------------------------


def plain_answer(model, tokenizer, case):
    tokens = torch.tensor([case.prompt + case.question])
    mask = torch.ones_like(tokens)
    written = model.generate(tokens, attention_mask=mask, max_new_tokens=case.new_tokens, do_sample=False)
    return tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True)


def attached_answer(model, tokenizer, case, policy):
    """The attached model is given the prompt, then the question."""
    tokens = torch.tensor([case.prompt + case.question])
    with policy.attach(model) as attachment, torch.no_grad():
        cache = attachment.cache()
        model(torch.tensor([case.prompt]), past_key_values=cache)
        call = {"attention_mask": torch.ones_like(tokens), "max_new_tokens": case.new_tokens, "do_sample": False}
        written = model.generate(tokens, past_key_values=cache, **call)
    return tokenizer.decode(written[0, tokens.shape[1] :], skip_special_tokens=True)


def test_answers_with_the_full_cache_are_those_of_the_plain_model(model, tokenizer):
    """Prompts and questions of different lengths in one group."""
    cases = [question_after(40, 1), question_after(28, 2), question_after(40, 1, asked=7), question_after(33, 4)]
    found = measured(model, tokenizer, cases)
    expected = tuple(plain_answer(model, tokenizer, case) for case in cases)

    assert found.texts == expected
    assert len(set(expected)) == 4
    assert found.values == {"letters": [float(len(text)) for text in expected]}


@pytest.mark.parametrize("name", ["streaming_llm", "adakv"])
def test_answers_under_a_policy_are_those_of_the_attached_model(model, tokenizer, name):
    cases, policy = [question_after(40, seed) for seed in (1, 2)], small(name)
    found = [measured(model, tokenizer, [case], policy).texts[0] for case in cases]

    assert found == [attached_answer(model, tokenizer, case, policy) for case in cases]
    assert found != [plain_answer(model, tokenizer, case) for case in cases]


def test_questions_about_one_prompt_are_answered_as_each_is_alone(model, tokenizer):
    """Whatever their lengths, and however much each may write: the others of the group change nothing."""
    shared, policy = ids(40, 9), small("snapkv")
    kinds = ((3, 6), (5, 6), (3, 2), (3, 9))
    cases = [Answer(shared, ids(asked, 50 + words), words, {"letters": len}) for asked, words in kinds]
    together = measured(model, tokenizer, cases, policy)
    alone = [measured(model, tokenizer, [case], policy) for case in cases]

    assert together.texts == tuple(one.texts[0] for one in alone)
    assert together.values["letters"] == [one.values["letters"][0] for one in alone]
    assert [len(text.split()) for text in together.texts] == [words for _, words in kinds]


def conversation(asked=(3, 5, 4), words=(6, 2, 5)):
    """A question about a prompt, and two further turns."""
    first, *others = (Turn(ids(a, 300 + a), w, {"correct": score_of}) for a, w in zip(asked, words, strict=True))
    return Answer(ids(40, 9), first.question, first.new_tokens, first.scores, tuple(others))


def score_of(text):
    return float(len(text))


def written_in_turns(model, tokenizer, case, cache, ended=()):
    """Token by token, each by a forward of its own, with the cache or with everything computed anew."""
    tokens, texts = list(case.prompt), []
    if cache is not None:
        model(torch.tensor([tokens]), past_key_values=cache)
    for turn in (case, *case.more):
        tokens += turn.question
        written = []
        while len(written) < turn.new_tokens and not (written and written[-1] in ended):
            seen = 0 if cache is None else cache.get_seq_length()
            call = {} if cache is None else {"past_key_values": cache}
            written.append(int(model(torch.tensor([tokens + written])[:, seen:], **call).logits[0, -1].argmax()))
        texts.append(tokenizer.decode(written, skip_special_tokens=True))
        tokens += written[:-1] if written[-1] in ended else written
    return texts


@pytest.mark.parametrize("name", [None, "adakv", "streaming_llm"])
def test_turns_are_answered_one_after_another_in_one_cache(model, tokenizer, name):
    case, policy = conversation(), name and small(name)
    found = measured(model, tokenizer, [conversation(words=(2, 3, 2)), case], policy)
    with torch.no_grad():
        if policy is None:
            expected = written_in_turns(model, tokenizer, case, None)
        else:
            with policy.attach(model) as attachment:
                expected = written_in_turns(model, tokenizer, case, attachment.cache())

    assert found.texts[1] == "\n".join(expected)
    lengths = [float(len(text)) for text in expected]
    assert found.values["correct"][1:] == [pytest.approx(sum(lengths) / 3)]
    assert found.values["last"][1:] == lengths[-1:]
    assert case.tokens == 40 + 3 + 6 + 5 + 2 + 4 + 5 - 1


def test_a_turn_that_the_model_ends_is_not_ended_twice(model, tokenizer, monkeypatch):
    """The next question brings what ends an answer."""
    case = conversation()
    with torch.no_grad():
        (first, *_) = written_in_turns(model, tokenizer, case, None)
        end = tokenizer.convert_tokens_to_ids(first.split()[2])
        monkeypatch.setattr(model.generation_config, "eos_token_id", end)
        expected = written_in_turns(model, tokenizer, case, None, (end,))
    assert len(expected[0].split()) < 6
    assert measured(model, tokenizer, [case]).texts == ("\n".join(expected),)


def test_an_answer_ends_where_the_model_ends_it(model, tokenizer, monkeypatch):
    """Pads behind it are no words; the other rows go on."""
    cases = [question_after(40, seed) for seed in (1, 2, 3)]
    words = [text.split() for text in measured(model, tokenizer, cases).texts]
    end = tokenizer.convert_tokens_to_ids(words[0][2])
    monkeypatch.setattr(model.generation_config, "eos_token_id", [end, IDS[EOS]])
    found = measured(model, tokenizer, cases)

    assert found.texts[0].split() == words[0][: words[0].index(words[0][2]) + 1]
    assert found.texts == tuple(plain_answer(model, tokenizer, case) for case in cases)


# -- bytes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["adakv", "h2o", "full"])
def test_bytes_held_are_what_the_layers_of_the_cache_say(model, tokenizer, name):
    """Of one row: entries, observed queries and state. The full cache's are those of its keys and values."""
    policy = kvpolicy.load(name) if name == "full" else small(name)
    for cases in ([question_after(40, seed) for seed in (1, 2)], [text_after(40, seed) for seed in (1, 2)]):
        run = GroupRun(model, tokenizer, cases, STEP)
        full = run.full()
        with kvpolicy.load("full").attach(model) as attachment:
            found, (cache,) = run.caches_under(policy.compile(model), attachment)
        held = sum(layer.storage.nbytes + layer.window.nbytes + layer.stats.state_bytes for layer in cache.managed)
        tokens = 40 + 3 + WORDS - 1 if isinstance(cases[0], Answer) else 40 + 13

        assert found.held_bytes == held / 2
        assert full.held_bytes == full.full_bytes == found.full_bytes == tokens * 3 * 2 * 2 * 8 * 4
        assert cache.get_seq_length() == tokens


def test_the_model_is_left_as_it_was(model, tokenizer):
    before = model.config._attn_implementation
    measured(model, tokenizer, [text_after(20)], small("snapkv"))

    assert kvpolicy.attached(model) is None
    assert model.config._attn_implementation == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
