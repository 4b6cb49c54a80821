"""`kvpolicy chat`: several turns on one cache, and what ends them."""

import re

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from kvpolicy.cli.generate.conversation import Conversation
from kvpolicy.errors import InputError
from kvpolicy.policy import load

TURNS = ("falcon", "the child walks .", "falcon gold")


def loaded(folder, eos=None):
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    model.generation_config = GenerationConfig(eos_token_id=eos, pad_token_id=0)
    return model, AutoTokenizer.from_pretrained(folder)


def answers(model, tokenizer, system, turns, count=6):
    """The plain model's answers, each to the whole conversation so far, written out by hand."""
    ends, text, found = model.generation_config.eos_token_id, f"note {system} . " if system else "", []
    ids = tokenizer(text, add_special_tokens=False)["input_ids"] if text else []
    for turn in turns:
        more = f"{'<eos> ' if found else ''}ask {turn} ."
        ids = ids + tokenizer(more, add_special_tokens=False)["input_ids"]
        tokens = torch.tensor([ids])
        whole = model.generate(tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=count, do_sample=False)[
            0
        ].tolist()
        ids = whole[:-1] if whole[-1] == ends else whole
        found.append(whole[len(tokens[0]) :])
    return found


class Lengths:
    """How many tokens each forward of a model is given."""

    def __init__(self, model):
        self.seen = []
        model.register_forward_pre_hook(self.note, with_kwargs=True)

    def note(self, _model, _args, call):
        self.seen.append(call["input_ids"].shape[1])


class Listening:
    """Takes the place of a streamer: the tokens of each turn."""

    def __init__(self):
        self.turns, self.prompted = [], False

    def put(self, value):
        if not self.prompted:
            self.turns.append([])
            self.prompted = True
        else:
            self.turns[-1] += value.flatten().tolist()

    def end(self):
        self.prompted = False


@pytest.mark.parametrize("system", [None, "gold"])
@pytest.mark.parametrize("ends", [False, True], ids=["cut", "ended"])
def test_turns_on_one_cache_are_those_of_the_growing_conversation(chat_folder, system, ends):
    """Token for token what the plain model gives; answers that were cut, and answers that a token ended."""
    plain, tokenizer = loaded(chat_folder)
    eos = answers(plain, tokenizer, system, TURNS)[0][2] if ends else None
    plain.generation_config.eos_token_id = eos
    expected = answers(plain, tokenizer, system, TURNS)
    model, _ = loaded(chat_folder, eos)
    heard = Listening()
    with load("full").attach(model) as attachment:
        conversation = Conversation(model, tokenizer, attachment.cache(), system)
        told = [conversation.turn(turn, 6, do_sample=False, streamer=heard) for turn in TURNS]

    assert heard.turns == expected
    without = [answer[:-1] if answer[-1] == eos else answer for answer in expected]
    assert told == [tokenizer.decode(answer, skip_special_tokens=True) for answer in without]
    assert any(len(answer) < 6 for answer in expected) == ends


def test_a_turn_computes_its_own_tokens_only(chat_folder):
    model, tokenizer = loaded(chat_folder)
    with load("snapkv", budget=16, protect={"sinks": 1, "recent": 4}, compress={"every": 4}).attach(
        model
    ) as attachment:
        conversation, lengths = Conversation(model, tokenizer, attachment.cache(), None), Lengths(model)
        conversation.turn("falcon", 6, do_sample=False)
        conversation.turn("the child walks .", 6, do_sample=False)
        report = attachment.report()

    # "ask falcon ."; then the last word of the first answer, "<eos> ask the child walks . ."
    assert lengths.seen == [3, 1, 1, 1, 1, 1, 8, 1, 1, 1, 1, 1]
    assert report.layers[0].seq_len == 3 + 5 + 8 + 5
    assert report.layers[0].held <= 20


def test_a_policy_that_evicts_goes_on_from_what_it_holds(chat_folder):
    """Turn by turn the same as one forward after another on a cache of the same policy, without any template."""
    model, tokenizer = loaded(chat_folder)
    policy = load("snapkv", budget=8, protect={"sinks": 1, "recent": 4}, compress={"every": 2})
    with policy.attach(model) as attachment:
        conversation = Conversation(model, tokenizer, attachment.cache(), None)
        told = [conversation.turn(turn, 6, do_sample=False) for turn in TURNS]
        cache, ids, found = attachment.cache(), [], []
        for turn in TURNS:
            ids += tokenizer(f"{'<eos> ' if ids else ''}ask {turn} .", add_special_tokens=False)["input_ids"]
            new = []
            with torch.no_grad():
                logits = model(torch.tensor([ids[cache.get_seq_length() :]]), past_key_values=cache).logits
                for step in range(6):
                    new.append(int(logits[0, -1].argmax()))
                    if step < 5:
                        logits = model(torch.tensor([new[-1:]]), past_key_values=cache).logits
            ids += new
            found.append(tokenizer.decode(new, skip_special_tokens=True))

    assert told == found


TRIMMING = (
    "{% for m in messages %}"
    "{{ m.role == 'user' and 'ask ' + m.content + ' . ' or m.content|trim + ' <eos> ' }}"
    "{% endfor %}"
)


def test_white_space_around_an_answer_may_be_cut(templated):
    folder = templated(TRIMMING)
    model, tokenizer = loaded(folder)
    with load("full").attach(model) as attachment:
        conversation = Conversation(model, tokenizer, attachment.cache(), None)
        conversation.turn("falcon", 3, do_sample=False)
        conversation._answer = f"  {conversation._answer}\n"
        conversation._messages[-1]["content"] = conversation._answer

        assert conversation.turn("gold", 3, do_sample=False)


FORGETTING = "{% for m in messages[-1:] %}{{ 'ask ' + m.content + ' . ' }}{% endfor %}"
SHORTENING = "{% for m in messages %}{{ m.role == 'user' and 'ask ' + m.content + ' . ' or '<eos> ' }}{% endfor %}"


@pytest.mark.parametrize("template", [FORGETTING, SHORTENING], ids=["forgets turns", "drops answers"])
def test_a_template_that_rewrites_earlier_turns_ends_the_chat(kv, templated, template):
    result = kv("chat", templated(template), "--max-new-tokens", 3, input="falcon\ngold\n")

    assert result.exit_code == 2
    assert len(result.stdout.splitlines()) == 1
    assert re.fullmatch(r"error: the chat template of this model writes earlier turns anew, .*\n", result.stderr)


def test_lines_are_turns_until_the_exit(kv, chat_folder):
    """Answers and nothing else go to stdout; blank lines are no turns."""
    words = ("chat", chat_folder, "--max-new-tokens", 6)
    result = kv(*words, input="falcon\r\n\n  the child walks .\n/exit\nfalcon gold\n")
    plain, tokenizer = loaded(chat_folder)
    expected = [tokenizer.decode(answer, skip_special_tokens=True) for answer in answers(plain, tokenizer, None, TURNS)]

    assert result.exit_code == 0, result.stderr
    assert [line.strip() for line in result.stdout.splitlines()] == expected[:2]
    assert result.stderr == ""


def test_the_end_of_stdin_ends_it(kv, chat_folder):
    result = kv("chat", chat_folder, "--system", "gold", "--max-new-tokens", 6, input="falcon")

    assert result.exit_code == 0
    assert len(result.stdout.splitlines()) == 1


def test_the_report_is_of_the_whole_conversation(kv, chat_folder, tmp_path):
    file = tmp_path / "small.yaml"
    file.write_text("kvpolicy: 1\nbudget: 8\ncompress: {every: 2}\nscore:\n  - {use: attention, queries: 2}\n")
    words = ("chat", chat_folder, "--policy", file, "--max-new-tokens", 6)
    result = kv(*words, input="falcon\nthe child walks .\n/report\n/help\n")

    assert result.exit_code == 0, result.stderr
    assert len(result.stdout.splitlines()) == 2
    assert "policy small:" in result.stderr
    assert re.search(r"│ +0-1 │ +21 │", result.stderr)
    assert "no such command: /help; there are /report and /exit" in result.stderr


@pytest.mark.parametrize(
    ("words", "typed", "message"),
    [
        (("--max-new-tokens", "0"), "falcon", "--max-new-tokens must be at least 1: 0"),
        (("--top-k", "-1"), "falcon", "--top-k must be at least 1: -1"),
        (("--policy", "nope"), "falcon", "unknown policy 'nope'"),
        (("--max-new-tokens", "400"), "falcon", "prompt and new tokens are 403 together, and the model knows 256"),
        ((), "zebra", "the prompt has words that the tokenizer does not know"),
        (("--system", "secret"), "falcon", "the chat template refuses this conversation: TemplateError: no secret"),
        ((), b"caf\xe9", "stdin: must be UTF-8"),
    ],
)
def test_bad_input_is_one_line(kv, chat_folder, words, typed, message):
    """Exit code 2, nothing on stdout."""
    result = kv("chat", chat_folder, *words, input=typed)

    assert result.exit_code == 2
    assert result.stdout == ""
    assert message in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_model_without_a_chat_template_is_refused(kv, folder):
    result = kv("chat", folder, input="falcon")

    assert result.exit_code == 2
    assert result.stderr == f"error: {folder}: has no chat template: use `kvpolicy run --raw`\n"


def test_a_conversation_that_outgrows_the_model_says_so(chat_folder):
    model, tokenizer = loaded(chat_folder)
    with load("full").attach(model) as attachment:
        conversation = Conversation(model, tokenizer, attachment.cache(), None)
        conversation.turn("falcon", 200, do_sample=False)
        with pytest.raises(InputError, match="prompt and new tokens are 407 together, and the model knows 256"):
            conversation.turn("falcon", 200, do_sample=False)
