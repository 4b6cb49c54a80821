"""Counts what the host reads from the device, and would wait for; on a CPU, where nothing waits.

Some functions look at numbers only where these are on a CPU: they ask for `device.type` first. What they read, and what
is read below them, is told apart, by their source.
"""

import contextlib
import functools
import inspect
import re
import sys
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter

# Each gives the host a number, or makes a tensor whose size follows from numbers on the device.
READING = {
    "_local_scalar_dense",  # item, int, float, bool, and a tensor as an index of Python
    "is_nonzero",
    "item",
    "equal",
    "nonzero",
    "argwhere",
    "masked_select",
    "unique_dim",
    "unique_consecutive",
    "_unique2",
    "bincount",
    "repeat_interleave.Tensor",
}
INDEXING = {"index.Tensor", "index_put", "index_put_", "_index_put_impl_"}  # by a mask
METHODS = ("tolist", "numpy", "cpu")  # that no operator is called for where the tensor is on a CPU already
ASKS = re.compile(r'device\.type [!=]= "cpu"')
OURS = ("kvpolicy", "kvpolicy_plugins", "kvpolicy_kernels")


class DeviceReads(TorchDispatchMode):
    """Counts reads; what Triton's interpreter reads itself is no kernel's."""

    def __init__(self):
        super().__init__()
        self.places = []  # the function of ours that read, and by what operator
        self.on_hosts_only = []  # likewise, the function that asked where it was
        self._interpreting = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__
        by_mask = name in INDEXING and any(_is_mask(one) for one in args[1])
        if name in READING or name.partition(".")[0] in READING or by_mask:
            self._note(name)
        return func(*args, **(kwargs or {}))

    def _note(self, name):
        if self._interpreting:
            return
        ours, frame = [], sys._getframe(2)
        while frame is not None:
            module = frame.f_globals.get("__name__", "").partition(".")[0]
            if module in OURS and not frame.f_code.co_name.startswith("<"):  # no comprehension
                ours.append(frame.f_code)
            frame = frame.f_back
        asking = [code.co_name for code in ours if _asks(code)]
        if asking:
            self.on_hosts_only.append((asking[0], name))
        else:
            self.places.append((ours[0].co_name if ours else "", name))

    @property
    def count(self):
        return len(self.places)

    @contextlib.contextmanager
    def counted(self):
        """Count what is read inside the block."""
        with contextlib.ExitStack() as stack:
            for name in METHODS:
                stack.enter_context(mock.patch.object(torch.Tensor, name, self._noting(name)))
            stack.enter_context(mock.patch.object(interpreter.GridExecutor, "__call__", self._launching()))
            stack.enter_context(self)
            yield self

    def _noting(self, name):
        inner = getattr(torch.Tensor, name)

        def method(tensor, *args, **named):
            self._note(name)
            return inner(tensor, *args, **named)

        return method

    def _launching(self):
        inner = interpreter.GridExecutor.__call__

        def launch(executor, *args, **named):
            self._interpreting += 1
            try:
                return inner(executor, *args, **named)
            finally:
                self._interpreting -= 1

        return launch


def _is_mask(index):
    return isinstance(index, torch.Tensor) and index.dtype in (torch.bool, torch.uint8)


@functools.cache
def _asks(code):
    """Whether a function asks whether tensors are on a CPU."""
    return ASKS.search(inspect.getsource(code)) is not None
