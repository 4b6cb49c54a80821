"""How long the hidden states of a pass are, seen by hooks on the attention modules while passes run."""

import threading
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from kvpolicy.integrations.transformers.models.hidden_states import hidden_states_of
from kvpolicy.integrations.transformers.passes.pass_cache import PassCache, PassLayer
from kvpolicy.integrations.transformers.torch_modes import outside_graphs


class HiddenNorms:
    """Tells each layer of the pass that runs how long the hidden states are that its attention module is given.

    Hooks stand on the modules from when this is made; whoever makes it puts the hooks of the model back. Forwards that
    other threads make through the same modules meanwhile are none of ours.
    """

    def __init__(self, attention: Sequence[nn.Module]) -> None:
        self._thread = threading.get_ident()
        self._layers: Sequence[PassLayer] = ()
        for ordinal, module in enumerate(attention):
            module.register_forward_pre_hook(partial(self._note, ordinal), with_kwargs=True)

    def expect(self, cache: PassCache) -> None:
        """The next forward of this thread is the pass of this cache."""
        self._layers = cache.managed

    @outside_graphs
    def _note(self, ordinal: int, module: nn.Module, args: tuple[Any, ...], call: dict[str, Any]) -> None:
        if threading.get_ident() == self._thread and ordinal < len(self._layers):
            states = hidden_states_of(module, args, call).detach()
            self._layers[ordinal].hidden_norms = torch.linalg.vector_norm(states, dim=-1, dtype=torch.float32)
