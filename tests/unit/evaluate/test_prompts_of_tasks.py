"""What the tasks are made of: prompts in parts, windows of tokens and of sentences."""

import pytest

from kvpolicy.errors import EvaluationError, InputError
from kvpolicy.evaluate.data.texts import Text
from kvpolicy.evaluate.tasks.case import Sources, TaskSizes, ids_of
from kvpolicy.evaluate.tasks.chat_prompt import as_case_parts, chat_prompt, turn_of
from kvpolicy.evaluate.tasks.documents import sentence_window, sentences_of, token_windows
from kvpolicy.evaluate.tasks.names import task_of
from tests.support.texts import SENTENCES, TEXTS, tokenizer_of
from tests.testbed_training.tokenizer import build_tokenizer

SIZES = TaskSizes(documents=3, length=600, scored=20)
TEXT_TASKS = ("text", "needle", "needles", "needles-two", "variables", "turns")


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


def test_a_further_turn_goes_on_as_the_template_would(sources):
    """Behind an answer as it was written, and without what ends it."""
    tokenizer, answered = sources.tokenizer, "There was a king."
    parts = chat_prompt(tokenizer, *PARTS)
    turn = turn_of(tokenizer, "And who else?", "There was also")
    whole = tokenizer.decode([*parts.context, *parts.question, *parts.answer, *ids_of(tokenizer, answered), *turn])
    context, question, answer = PARTS
    if tokenizer.chat_template is None:
        assert whole == f"<s>{context}\n\n{question}\n{answer}{answered}\n\nAnd who else?\nThere was also"
        return
    asked = [f"{context}\n\n{question}", answer + answered, "And who else?"]
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, asked, strict=True)]
    expected = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert whole == expected + "There was also"


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
    for name in TEXT_TASKS:
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


def test_a_template_that_refuses_and_words_that_are_unknown_are_told_in_a_line(plain):
    """Templates are programs, and tokenizers of words know some only."""
    refusing = tokenizer_of("{{ raise_exception('no users') }}")
    with pytest.raises(InputError, match=r"the chat template refuses this conversation: .*no users"):
        chat_prompt(refusing, "A king. ", "Who?")
    with pytest.raises(InputError, match="the text has words that the tokenizer does not know"):
        ids_of(build_tokenizer(), "supercalifragilistic")
