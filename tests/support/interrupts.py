"""Forwards of attached models, and interrupts at any line of what runs during one."""

import contextlib
import pathlib
import sys

import torch

import kvpolicy

PACKAGE = pathlib.Path(kvpolicy.__file__).parent
RUNTIME = tuple(str(PACKAGE / name) for name in ("cache", "attention", "integrations"))


def forward(model, cache, tokens, mask=None):
    """The logits of a forward of an attached model."""
    with torch.no_grad():
        return model(tokens, attention_mask=mask, past_key_values=cache).logits


@contextlib.contextmanager
def failing(module, error=torch.OutOfMemoryError):
    """The module raises when it is called."""

    def refuse(*_args):
        raise error("on purpose")

    handle = module.register_forward_pre_hook(refuse)
    try:
        yield
    finally:
        handle.remove()


class Interrupts:
    """Counts the lines that are run in these packages, and raises KeyboardInterrupt before one of them."""

    def __init__(self, at=-1):
        self.at, self.count = at, 0

    def __enter__(self):
        self._before = sys.gettrace()
        sys.settrace(self._called)
        return self

    def __exit__(self, *_raised):
        sys.settrace(self._before)

    def _called(self, frame, _event, _argument):
        return self._line if frame.f_code.co_filename.startswith(RUNTIME) else None

    def _line(self, _frame, event, _argument):
        if event == "line":
            self.count += 1
            if self.count - 1 == self.at:
                raise KeyboardInterrupt("on purpose")
        return self._line
