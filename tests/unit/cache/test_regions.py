"""Regions located by strings and by the roles of a chat template; how many tokens of a row are protected."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from kvpolicy.cache.request.regions import Regions
from kvpolicy.cache.request.request_spans import RequestSpans
from kvpolicy.errors import RegionError
from kvpolicy.spec.policy import Protect

UNKNOWN = "?"
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} </>{% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
FORGETTING = "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] if loop.last else 'cut' }} </>{% endfor %}"


@pytest.fixture(scope="module")
def tokenizer():
    """A token for each word and each mark."""
    words = Tokenizer(models.WordLevel({UNKNOWN: 0}, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation("isolated")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=words, unk_token=UNKNOWN, chat_template=TEMPLATE)


def test_strings_are_found_wherever_they_stand(tokenizer):
    text = "be brief . tools : search , read . now : be brief ."
    found = Regions.of_texts(tokenizer, text, {"system": "be brief .", "tools": "search , read"})
    assert found.names == ("system", "tools")
    assert found.rows == (((1, 0, 3), (2, 5, 8), (1, 11, 14)),)


def test_a_part_of_a_word_takes_the_whole_token(tokenizer):
    assert Regions.of_texts(tokenizer, "one twofold three", {"two": "fold th"}).rows == (((1, 1, 3),),)


def test_every_text_of_a_batch_is_looked_at(tokenizer):
    found = Regions.of_texts(tokenizer, ["a b c", "c b a b"], {"b": "b"})
    assert found.rows == (((1, 1, 2),), ((1, 1, 2), (1, 3, 4)))
    with pytest.raises(RegionError, match="region 'b': the text does not contain 'b'"):
        Regions.of_texts(tokenizer, ["a b c", "c a"], {"b": "b"})


def test_roles_are_found_in_what_the_chat_template_writes(tokenizer):
    chat = [
        {"role": "system", "content": "be brief"},
        {"role": "user", "content": "what is it ?"},
        {"role": "assistant", "content": "a fox"},
        {"role": "user", "content": "sure ?"},
    ]
    found = Regions.of_chat(tokenizer, chat, add_generation_prompt=True)
    words = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    tokens = [words[start:stop] for start, stop in tokenizer(words, return_offsets_mapping=True)["offset_mapping"]]
    spoken = {
        name: " ".join(token for start, stop in spans for token in tokens[start:stop])
        for name, spans in ((name, _spans(found, name)) for name in found.names)
    }
    assert spoken["system"] == "< system > be brief < / >"
    assert spoken["user"] == "< user > what is it ? < / > < user > sure ? < / >"
    assert spoken["assistant"] == "< assistant > a fox < / >"
    assert Regions.of_chat(tokenizer, [chat, chat[:2]], add_generation_prompt=True).rows[0] == found.rows[0]


def _spans(regions, name):
    number = regions.names.index(name) + 1
    return [(start, stop) for other, start, stop in regions.rows[0] if other == number]


def test_a_template_that_rewrites_earlier_messages_is_refused(tokenizer):
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    with pytest.raises(RegionError, match=r"message 0 \('user'\): the chat template formats it differently"):
        Regions.of_chat(tokenizer, chat, chat_template=FORGETTING)


def test_a_tokenizer_without_offsets_is_refused():
    def slow(_text, **_options):
        raise NotImplementedError("return_offset_mapping is not available when using Python tokenizers")

    with pytest.raises(RegionError, match="only fast tokenizers have"):
        Regions.of_texts(slow, "a b", {"b": "b"})


def test_regions_that_join_others_keep_their_numbers():
    first, more = Regions.of([{"a": (0, 2)}, {"b": (3, 4)}]), Regions.of([{"c": (7, 9), "b": (2, 4)}, {"a": (0, 1)}])
    assert first.joined(more).names == ("a", "b", "c")
    assert first.joined(more).rows == (((1, 0, 2), (2, 2, 4), (3, 7, 9)), ((1, 0, 1), (2, 3, 4)))


@st.composite
def rows(draw):
    """Protected spans of one row, its tokens, the end of its prompt, sinks and recent entries."""
    points = sorted(draw(st.lists(st.integers(0, 60), max_size=8, unique=True)))
    spans = list(zip(points[::2], points[1::2], strict=False))
    return spans, *(draw(st.integers(0, 70)) for _ in range(4))


@given(rows(), st.booleans())
def test_what_is_protected_is_counted_once(row, prompt):
    spans, tokens, end, sinks, recent = row
    end = min(end, tokens)
    regions = Regions.of({"a": spans, "b": []})
    protect = Protect(prompt=prompt, regions=("a",))
    found = RequestSpans(protect, regions)
    found.begin(1)
    found.note_prompt([end], over=True)
    expected = {token for token in range(tokens) if token < sinks or token >= tokens - recent}
    expected |= {token for start, stop in spans for token in range(start, min(stop, tokens))}
    expected |= set(range(end)) if prompt else set()
    assert found.protected(0, tokens, sinks, recent) == len(expected)
