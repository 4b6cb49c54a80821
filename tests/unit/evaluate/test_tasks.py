"""Cases of real text: what stands where, what is asked, and what is right."""

import re
from itertools import pairwise

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as Bytes
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.data.texts import Text
from kvpolicy.evaluate.tasks.case import Sources, TaskSizes, ids_of
from kvpolicy.evaluate.tasks.chat_prompt import as_case_parts, chat_prompt
from kvpolicy.evaluate.tasks.documents import sentence_window, sentences_of, token_windows
from kvpolicy.evaluate.tasks.names import TASKS, require_tasks, task_of

WORDS = ["miller", "baker", "widow", "king", "poet", "sailor", "guest", "judge"]
VERBS = ["waits", "dreams", "sings", "walks", "laughs", "listens"]
SENTENCES = [f"Sentence {number}: the {WORDS[number % 8]} {VERBS[number % 6]} by the river. " for number in range(400)]
TEXTS = tuple(Text(f"part {part}", "".join(SENTENCES[part::4])) for part in range(4))
TEMPLATE = (
    "{% for message in messages %}<|user|>\n{{ message['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
SPECIAL = ["<s>", "</s>", "<|user|>", "<|end|>", "<|assistant|>"]
NAMED = {"bos_token": "<s>", "eos_token": "</s>"}
SIZES = TaskSizes(documents=3, length=600, scored=20, questions=3, seed=4)
SEEN = {"needle": True, "needle-unseen": False, "needles": True, "needles-unseen": False, "needles-two": True}
NEEDLE = re.compile(r"One of the special magic numbers for (\w+) is: (\d+)\. ")


def tokenizer_of(template):
    """A small byte-level tokenizer that begins a text with <s>."""
    backend = Tokenizer(BPE())
    backend.pre_tokenizer, backend.decoder = ByteLevel(add_prefix_space=False), Bytes()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=500, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator([*(text.text for text in TEXTS), "End. \n\nAnd\n\n" * 200], trainer)
    backend.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    made = PreTrainedTokenizerFast(tokenizer_object=backend, **NAMED)
    made.chat_template = template
    return made


@pytest.fixture(scope="module", params=[None, TEMPLATE], ids=["plain", "chat"])
def sources(request):
    return Sources(tokenizer_of(request.param), TEXTS)


@pytest.fixture(scope="module")
def plain():
    return Sources(tokenizer_of(None), TEXTS)


def text_of(sources, ids):
    return sources.tokenizer.decode(list(ids))


def asked_about(text):
    """The cities or the value that a question names."""
    return re.findall(r"\b(?:[A-Z][a-z]+)\b", text.partition("for ")[2].partition(" mentioned")[0])


# -- needles ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SEEN)
def test_needles_stand_where_their_depths_say(sources, name):
    """Evenly spread, shifted from document to document, so that all depths occur."""
    groups, depths = task_of(name).groups(sources, SIZES), []
    for index, cases in enumerate(groups):
        text = text_of(sources, cases[0].prompt)
        needles = len(NEEDLE.findall(text))
        hay = len(re.findall(r"Sentence \d+:", text))
        assert needles == (1 if name.startswith("needle-") or name == "needle" else 8)
        for order, found in enumerate(NEEDLE.finditer(text)):
            before = len(re.findall(r"Sentence \d+:", text[: found.start()]))
            depth = (order * 3 + index + 0.5) / (3 * needles)
            depths.append(depth)
            assert before == int(depth * hay)

    assert [round(after - before, 9) for before, after in pairwise(sorted(depths))] == [round(1 / len(depths), 9)] * (
        len(depths) - 1
    )


@pytest.mark.parametrize("name", SEEN)
def test_a_needle_is_a_sentence_between_whole_ones(sources, name):
    """Nothing of the text is broken or lost: without needles it is a run of the sentences as they are."""
    every = "".join(text.text for text in TEXTS)
    for cases in task_of(name).groups(sources, SIZES):
        text = NEEDLE.sub("", text_of(sources, cases[0].prompt))
        body = text[text.index("Sentence ") : text.rindex(" by the river. ") + len(" by the river. ")]
        assert body in every + every
        assert len({case.prompt[:300] for case in cases}) == 1


@pytest.mark.parametrize("name", SEEN)
def test_question_and_numbers_belong_together(sources, name):
    """The numbers that the text gives for the cities asked about are right, with and without commas; others are not."""
    two, seen_questions = name.endswith("two"), set()
    for cases in task_of(name).groups(sources, SIZES):
        numbers = dict(NEEDLE.findall(text_of(sources, cases[0].prompt)))
        assert all(len(number) == 7 for number in numbers.values())
        assert len(cases) == (1 if len(numbers) == 1 else 3)
        for case in cases:
            whole = text_of(sources, case.prompt + case.question)
            question = whole[whole.rindex("What ") :]
            cities = asked_about(question)
            right = [numbers[city] for city in cities]
            others = [number for city, number in numbers.items() if city not in cities]
            score = case.scores["correct"]
            assert len(cities) == (2 if two else 1)
            assert score(" is ".join(right)) == 1
            assert score(" and ".join(f"{int(number):,}" for number in right)) == 1
            assert score(" ".join(others)) == 0
            assert score(right[0]) == (0.5 if two else 1)
            assert score(right[0][:-1]) == 0
            assert case.new_tokens >= sum(len(ids_of(sources.tokenizer, f" {number},")) for number in right)
            seen_questions.add((cases[0].prompt[:400], tuple(sorted(cities))))
    assert len(seen_questions) == sum(map(len, task_of(name).groups(sources, SIZES)))


@pytest.mark.parametrize("name", [*SEEN, "variables"])
def test_a_question_that_scorers_see_is_part_of_what_is_compressed(sources, name):
    """Otherwise it comes behind; the words that the answer begins with always do."""
    question = "Find all variables" if name == "variables" else "What "
    answer = "According to" if name == "variables" else "The special magic number"
    for case in (case for cases in task_of(name).groups(sources, SIZES) for case in cases):
        prompt, behind = text_of(sources, case.prompt), text_of(sources, case.question)
        assert (question in prompt) == SEEN.get(name, True)
        assert (question in behind) != SEEN.get(name, True)
        assert answer in behind
        assert answer not in prompt


def test_a_needle_is_about_as_long_a_prompt_as_was_asked_for(sources):
    """Up to introduction, question and one sentence."""
    for length in (300, 900):
        for (case,) in task_of("needle").groups(sources, TaskSizes(documents=2, length=length)):
            assert length <= len(case.prompt) < length + 150


# -- chains ----------------------------------------------------------------------------------------------------


def test_a_chain_of_variables_is_in_order_and_all_of_it_is_right(sources):
    for (case,) in task_of("variables").groups(sources, SIZES):
        text = text_of(sources, case.prompt)
        assigned = re.findall(r"VAR ([A-Z]{5}) = (?:VAR )?(\w+)\. ", text)
        names, values = zip(*assigned, strict=True)
        value = re.search(r"assigned the value (\d{5}) in", text).group(1)
        assert len(set(names)) == 3
        assert values == (value, *names[:-1])
        score = case.scores["correct"]
        assert score(f" {', '.join(names)}.") == 1
        assert score(" ".join(names[:2])) == pytest.approx(2 / 3)
        assert score("ZZZZZ") == 0


# -- prompts ---------------------------------------------------------------------------------------------------

PARTS = ("Once there was a king. ", "Who was there?", "There was")


def whole_prompt(tokenizer, context, question, answer):
    """The prompt as one text, rendered by the library where there is a template; and its ids."""
    if tokenizer.chat_template is None:
        text = f"{context}\n\n{question}\n{answer}"
        return f"<s>{text}", tokenizer(text)["input_ids"]
    message = {"role": "user", "content": f"{context}\n\n{question}"}
    text = tokenizer.apply_chat_template([message], tokenize=False, add_generation_prompt=True) + answer
    return text, tokenizer(text, add_special_tokens=False)["input_ids"]


def test_the_parts_of_a_prompt_are_together_the_whole_text(sources):
    """As text exactly; each part is tokenised by itself, so a blank at a border may be another token."""
    tokenizer = sources.tokenizer
    parts = chat_prompt(tokenizer, *PARTS)
    text, ids = whole_prompt(tokenizer, *PARTS)
    joined = [*parts.context, *parts.question, *parts.answer]

    assert tokenizer.decode(joined) == text
    assert joined != ids
    assert [one for one in joined if tokenizer.decode([one]).strip()] == [
        one for one in ids if tokenizer.decode([one]).strip()
    ]
    assert joined.count(0) == (tokenizer.chat_template is None)
    assert as_case_parts(parts, seen=True) == ((*parts.context, *parts.question), parts.answer)
    assert as_case_parts(parts, seen=False) == (parts.context, (*parts.question, *parts.answer))


def test_without_blanks_at_the_borders_the_parts_are_the_tokens_of_the_whole(sources):
    stripped = tuple(part.strip() for part in PARTS)
    parts = chat_prompt(sources.tokenizer, *stripped)

    assert [*parts.context, *parts.question, *parts.answer] == whole_prompt(sources.tokenizer, *stripped)[1]


# -- windows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("count", "length"), [(1, 50), (7, 120), (12, 300), (1, 4000)])
def test_windows_have_the_length_asked_for_and_never_overlap(plain, count, length):
    """Each begins as a text does; the last case is longer than any text, so that it crosses their borders."""
    windows = token_windows(plain.tokenizer, TEXTS, count, length)
    encoded = [ids_of(plain.tokenizer, text.text) for text in TEXTS]
    longest = max(map(len, encoded))
    streams = encoded if length - 1 <= longest else [[one for ids in encoded for one in ids]]
    taken = set()
    for window in windows:
        assert len(window) == length
        assert window[0] == 0
        places = {
            (index, start)
            for index, stream in enumerate(streams)
            for start in range(len(stream) - length + 2)
            if stream[start : start + length - 1] == window[1:]
        }
        ((index, start),) = places
        here = {(index, place) for place in range(start, start + length - 1)}
        assert not here & taken
        taken |= here
    assert len(windows) == count


def test_windows_are_spread_over_all_texts(plain):
    firsts = [plain.tokenizer.decode(window[1:40]) for window in token_windows(plain.tokenizer, TEXTS, 4, 100)]
    parts = [next(part for part, text in enumerate(TEXTS) if first in text.text) for first in firsts]

    assert parts == [0, 1, 2, 3]


@pytest.mark.parametrize(("count", "length"), [(1, 100_000), (5000, 50), (2, 1)])
def test_texts_that_are_too_short_are_an_error(plain, count, length):
    with pytest.raises(EvaluationError, match="text: "):
        token_windows(plain.tokenizer, TEXTS, count, length)


def test_every_task_refuses_texts_that_are_too_short(plain):
    few = Sources(plain.tokenizer, TEXTS[:1])
    for name in ("text", *SEEN, "variables"):
        with pytest.raises(EvaluationError, match=r"text: .* are needed, and the texts have"):
            task_of(name).groups(few, TaskSizes(documents=2, length=9000))
    with pytest.raises(EvaluationError, match="tokens are needed"):
        task_of("needle").groups(Sources(plain.tokenizer, ()), SIZES)


def test_continuations_are_a_prompt_and_what_follows_it(plain):
    groups = task_of("text").groups(plain, SIZES)
    every = [ids_of(plain.tokenizer, text.text) for text in TEXTS]

    assert [len(cases) for cases in groups] == [1, 1, 1]
    for (case,) in groups:
        assert (len(case.prompt), len(case.text)) == (600, 20)
        joined = [*case.prompt[1:], *case.text]
        assert any(joined == ids[start : start + 619] for ids in every for start in range(len(ids)))


def test_sentences_are_cut_behind_their_ends_and_nothing_is_lost():
    text = 'He said "Go!" She went. "Why?" (Nobody knows.) And so 3.5 is\n\nit...  The end'
    found = sentences_of([Text("one", text), Text("two", " \n ")])

    assert "".join(found) == text
    assert found[:2] == ['He said "Go!" ', "She went. "]
    assert found[-1] == "The end"


def test_windows_of_sentences_go_round(plain):
    """As many as reach the length, from another place for each; the last one goes on at the start."""
    sentences = SENTENCES[:40]
    one = len(ids_of(plain.tokenizer, sentences[30]))
    windows = [sentence_window(plain.tokenizer, sentences, index, 4, 15 * one) for index in range(4)]
    starts = [sentences.index(window[0]) for window in windows]

    assert starts == [0, 10, 20, 30]
    for start, window in zip(starts, windows, strict=True):
        assert window == (sentences + sentences)[start : start + len(window)]
        tokens = [len(ids_of(plain.tokenizer, sentence)) for sentence in window]
        assert sum(tokens) >= 15 * one > sum(tokens[:-1])


# -- all tasks -------------------------------------------------------------------------------------------------


def as_data(groups):
    return [[(case.prompt, getattr(case, "question", None) or case.text) for case in cases] for cases in groups]


@pytest.mark.parametrize("name", [name for name in TASKS if name in SEEN or name in ("text", "variables")])
def test_the_same_seed_gives_the_same_cases_and_another_one_others(plain, name):
    """What text follows is not asked: the seed does not change it."""
    task = task_of(name)
    first, again, other = (as_data(task.groups(plain, TaskSizes(3, 300, 20, 3, seed))) for seed in (4, 4, 5))

    assert first == again
    assert (first != other) == (name != "text")
    assert len({cases[0][0] for cases in first}) == 3


def test_tasks_have_the_names_and_metrics_they_say():
    for name, task in TASKS.items():
        assert task.name == name
        assert task.summary
        assert set(task.metrics) in ({"correct"}, {"correct", "prefix"}, {"kl", "top1", "agreed", "nll"})


def test_unknown_tasks_and_those_of_other_models_are_refused():
    with pytest.raises(EvaluationError, match=r"task: unknown: 'needls'.*needles"):
        require_tasks(["needls"], testbed=False)
    with pytest.raises(EvaluationError, match="task: recall is for the embedded model"):
        require_tasks(["text", "recall"], testbed=False)
    with pytest.raises(EvaluationError, match="task: text is for models that read text"):
        require_tasks(["recall", "text"], testbed=True)
    require_tasks(["recall", "tracking-unseen"], testbed=True)
