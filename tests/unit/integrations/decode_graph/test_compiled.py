"""Both decode steps are one graph each for `torch.compile`, and stay the same graph."""

import pytest
import torch
from torch._dynamo.utils import counters

from kvpolicy.integrations.transformers.attachment import Attachment
from kvpolicy.integrations.transformers.decode_graph.runners import Compiled, Mode
from tests.support.alone import repeat
from tests.support.decisions import Decisions
from tests.support.models import build, generate, prompt
from tests.support.policies import small

PROMPTS = ((30, 21), (19, 40))


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def said(caplog):
    return [record.getMessage() for record in caplog.records if record.name == "kvpolicy"]


def compiled(policy, one, backend):
    return Attachment(policy.compile(one), one, Mode(backend))


@pytest.mark.parametrize("name", ["rkv", "gkv", "h2o", "streaming_llm"])
def test_two_graphs_serve_all_rounds_of_all_generations(name):
    one = build(num_hidden_layers=1)
    policy, decisions = small(name), Decisions()
    with policy.attach(one), decisions.watched():
        expected = [generate(one, *prompt(*lengths)) for lengths in PROMPTS]
    with compiled(policy, one, "eager") as attachment, decisions.followed():
        for theirs, lengths in zip(expected, PROMPTS, strict=True):
            repeat(theirs, slice(None), one, *prompt(*lengths))
        assert min(layer.compressions for layer in attachment.report().layers) >= 5
    assert counters["stats"]["unique_graphs"] == 2
    assert not counters["graph_break"]
    assert not counters["recompiles"]


def test_graphs_that_change_nothing_in_place_themselves_write_to_the_same_storage():
    one = build(num_hidden_layers=1)
    decisions = Decisions()
    with small("h2o").attach(one), decisions.watched():
        expected = generate(one, *prompt(30, 21))
    with compiled(small("h2o"), one, "aot_eager") as attachment, decisions.followed():
        repeat(expected, slice(None), one, *prompt(30, 21))
        session = attachment._decode._session
    assert counters["stats"]["unique_graphs"] == 2
    assert all(isinstance(run, Compiled) for run in (session._step, session._step_and_compress))


def test_any_number_of_batch_sizes_may_follow_each_other(caplog):
    one = build(num_hidden_layers=1)
    with torch._dynamo.config.patch(recompile_limit=1), compiled(small("snapkv"), one, "eager"):
        for rows in (1, 2, 3):  # more than `torch.compile` would now compile one piece of code for
            generate(one, *prompt(*[20] * rows), count=4)
    assert not said(caplog)
    assert counters["stats"]["unique_graphs"] == 3


def test_a_model_that_cannot_be_compiled_is_served_as_it_stands(caplog):
    one = build(num_hidden_layers=1)
    policy, layer = small("snapkv"), one.model.layers[0]
    own = layer.forward

    def forward(hidden, **call):
        if float(hidden.sum()) == 0.5:
            return None
        return own(hidden, **call)

    layer.forward = forward
    decisions = Decisions()
    with policy.attach(one), decisions.watched():
        expected = generate(one, *prompt(30, 21))
    with compiled(policy, one, "eager"), decisions.followed():
        repeat(expected, slice(None), one, *prompt(30, 21))
    assert len(said(caplog)) == 2
    assert all("not compiled" in message for message in said(caplog))
