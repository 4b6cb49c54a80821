"""An interrupt, at whatever line of attaching or detaching, leaves a model attached as a whole or as it was."""

import gc
import sys
from pathlib import Path

import pytest
import torch

from kvpolicy.integrations.transformers.attachment import attached
from kvpolicy.integrations.transformers.attention_function import managed_modules
from tests.support import fingerprint
from tests.support.interrupts import RUNTIME
from tests.support.models import build, difference, generate, prompt
from tests.support.policies import small


@pytest.fixture(autouse=True)
def nothing_attached():
    """Attached models of other tests that nobody holds any more are gone: here, those that are left are counted."""
    gc.collect()


class Interrupter:
    """Raises KeyboardInterrupt when a line of the runtime is reached for the first time; or notes all lines."""

    def __init__(self, target=None):
        self.target, self.seen = target, {}

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        sys.settrace(self._before)

    def _call(self, frame, _event, _argument):
        return self._line if frame.f_code.co_filename.startswith(RUNTIME) else None

    def _line(self, frame, event, _argument):
        place = (frame.f_code.co_filename, frame.f_lineno)
        if event == "line" and place not in self.seen:
            self.seen[place] = True
            if place == self.target:
                sys.settrace(self._before)
                raise KeyboardInterrupt
        return self._line


def lines_of(action, *files):
    """The lines that an action goes through, in these files or in all."""
    with Interrupter() as noted:
        action()
    return [place for place in noted.seen if not files or Path(place[0]).name in files]


def check(model, before):
    """Either all of it or nothing."""
    present = attached(model)
    if present is not None:
        assert present.complete
        assert len(managed_modules) == model.config.num_hidden_layers
        present.detach()
    assert fingerprint.of_model(model) == before
    assert len(managed_modules) == 0


# With fixed shapes few lines differ.
@pytest.mark.parametrize(("graph", "files"), [(False, ()), (True, ("attachment.py", "decode_forward.py"))])
def test_an_interrupt_while_attaching(graph, files):
    model, policy, tokens = build(num_hidden_layers=1), small("snapkv"), prompt(16)[0]
    before, state = fingerprint.of_model(model), torch.get_rng_state()
    expected = generate(model, tokens, count=2)
    policy.attach(model, graph=graph).detach()  # what is done once in a process is done
    lines = lines_of(lambda: policy.attach(model, graph=graph), *files)
    attached(model).detach()
    assert len(lines) > 40
    all_of = ("attachment.py", "decode_forward.py", "guard.py", "model_snapshot.py")
    for line in [line for number, line in enumerate(lines) if Path(line[0]).name in all_of or number % 5 == 0]:
        with pytest.raises(KeyboardInterrupt), Interrupter(line):
            policy.attach(model, graph=graph)
        check(model, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert difference(generate(model, tokens, count=2), expected) == 0
    policy.attach(model).detach()


@pytest.mark.parametrize("graph", [False, True])
def test_an_interrupt_while_detaching(graph):
    model, policy, tokens = build(num_hidden_layers=1), small("snapkv"), prompt(16)[0]
    before = fingerprint.of_model(model)

    def attach():
        attachment = policy.attach(model, graph=graph)
        generate(model, tokens, count=4)
        return attachment

    lines = lines_of(attach().detach)
    assert len(lines) > 20
    for line in lines:
        attachment = attach()
        with pytest.raises(KeyboardInterrupt), Interrupter(line):
            attachment.detach()
        check(model, before)


@pytest.mark.parametrize("again", ["detach", "attach"])
def test_what_a_second_interrupt_left_is_finished_later(again):
    """Where even the undoing is cut short, detaching or attaching again finishes it."""
    model, policy = build(num_hidden_layers=1), small("snapkv")
    before = fingerprint.of_model(model)
    attachment = policy.attach(model)
    lines = lines_of(attachment.undo, "attachment.py")
    assert len(lines) > 10
    for first in lines:
        attachment = policy.attach(model)
        undo, calls = attachment.undo, []

        def twice(undo=undo, calls=calls, first=first):
            calls.append(None)
            with Interrupter(first if len(calls) <= 2 else None):
                undo()

        attachment.undo = twice
        with pytest.raises(KeyboardInterrupt):
            attachment.detach()
        if attached(model) is not None:
            whole = attachment.complete  # nothing had been undone
            attachment.detach() if whole or again == "detach" else policy.attach(model).detach()
        assert fingerprint.of_model(model) == before
        assert len(managed_modules) == 0
