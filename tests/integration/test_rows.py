"""Every row of a batch gives what it would give alone, wherever its pads stand."""

import contextlib

import pytest
import torch

from kvpolicy.errors import NonFiniteScoreWarning
from tests.support.alone import assert_rows_alone, repeat
from tests.support.decisions import Decisions
from tests.support.models import ARCHITECTURES, PAD, generate, model, prompt
from tests.support.policies import NAMES, held, small

LENGTHS = (40, 29, 7)  # longer than the budget twice, shorter than it once
LAYERS = 3


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_a_padded_batch_equals_its_own_run(name):
    with small(name).attach(model()) as attachment:
        decisions = assert_rows_alone(model(), attachment, *prompt(*LENGTHS))
    assert decisions.repeated >= LAYERS * (5 + 5 + 4)  # every compression of every row found its like


@pytest.mark.parametrize("name", ["snapkv", "adakv"])
@pytest.mark.parametrize("architecture", ARCHITECTURES[1:])
def test_rows_are_independent_in_every_architecture(architecture, name):
    with small(name).attach(model(architecture)) as attachment:
        assert_rows_alone(model(architecture), attachment, *prompt(*LENGTHS))


@pytest.mark.parametrize("name", ["rkv", "adakv"])
@pytest.mark.parametrize("budget", ["25%", "20KiB"])
def test_rows_are_independent_when_their_budgets_differ(name, budget):
    """And with the budgets what is protected, where that is a share of them."""
    policy = small(name, budget=budget, protect={"sinks": "10%", "recent": "40%"})
    with policy.attach(model()) as attachment:
        assert_rows_alone(model(), attachment, *prompt(*LENGTHS))


@pytest.mark.parametrize("name", NAMES)
def test_pads_in_the_middle_of_a_chat_change_nothing(name):
    """The second prompts of a batched chat differ in length, so the pads of a row stand between its turns."""
    first, second, steps = (30, 21), (9, 16), 6
    one = model()
    tokens, mask = prompt(*first)
    more, more_mask = prompt(*second, seed=1)
    with small(name).attach(one) as attachment:
        cache = attachment.cache()
        decisions = Decisions()
        with decisions.watched():
            answer = generate(one, tokens, mask, count=steps, past_key_values=cache)
            whole = torch.cat([answer.sequences, more], 1)
            whole_mask = torch.cat([mask, torch.ones(2, steps, dtype=torch.long), more_mask], 1)
            together = generate(one, whole, whole_mask, past_key_values=cache)
        kept = [rows[0] for rows in held(cache)], [rows[1] for rows in held(cache)]
        for row in range(2):
            alone = attachment.cache()
            with decisions.followed():
                own = tokens[row : row + 1, -first[row] :]
                own = repeat(answer, [row], one, own, count=steps, past_key_values=alone).sequences
                own = torch.cat([own, more[row : row + 1, -second[row] :]], 1)
                repeat(together, [row], one, own, past_key_values=alone)
            assert [rows[0] for rows in held(alone)] == kept[row]


def test_pads_on_the_right_of_a_prompt_are_not_kept():
    one = model()
    tokens, mask = prompt(20, 20)
    mask[1, 15:] = 0
    with small("snapkv", budget=16).attach(one) as attachment:
        cache = attachment.cache()
        with torch.no_grad():
            one(tokens.where(mask.bool(), PAD), attention_mask=mask, past_key_values=cache)
        assert all(max(max(heads) for heads in rows[1]) == 14 for rows in held(cache))
        assert all(len(heads) == 15 for rows in held(cache) for heads in rows[1])


@pytest.mark.parametrize("name", ["snapkv", "h2o", "adakv"])
def test_what_unused_memory_holds_is_never_read(name, monkeypatch):
    """Rows of different lengths leave slots that nothing has written: whatever stands there must not matter."""
    one = model()
    tokens, mask = prompt(*LENGTHS)
    with small(name).attach(one):
        expected = generate(one, tokens, mask)
        empty = torch.empty

        def poisoned(*args, **options):
            tensor = empty(*args, **options)
            return tensor.fill_(torch.nan) if tensor.is_floating_point() else tensor.fill_(7)

        monkeypatch.setattr(torch, "empty", poisoned)
        found = generate(one, tokens, mask)
    assert torch.equal(found.sequences, expected.sequences)
    assert all(torch.equal(left, right) for left, right in zip(found.logits, expected.logits, strict=True))


@pytest.mark.parametrize("name", ["snapkv", "adakv"])
def test_a_row_that_turns_into_nan_spoils_no_other(name):
    one = model()
    tokens, _ = prompt(40, 40)
    embedded = one.get_input_embeddings()(tokens).detach()
    broken = embedded.clone()
    broken[0, 5] = torch.nan
    results = []
    for inputs in (embedded, broken):
        with small(name).attach(one) as attachment, torch.no_grad():
            cache = attachment.cache()
            with pytest.warns(NonFiniteScoreWarning) if inputs is broken else contextlib.nullcontext():
                one(inputs_embeds=inputs, past_key_values=cache)
                results.append(one(inputs_embeds=inputs[:, :1], past_key_values=cache).logits)
    assert results[1][0].isnan().all()
    assert torch.equal(results[0][1], results[1][1])
