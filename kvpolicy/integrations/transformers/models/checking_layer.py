"""A cache layer that evicts nothing and checks how a model uses it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvpolicy.errors import UnsupportedModelError
from kvpolicy.integrations.transformers.calls.attention_arguments import changing
from kvpolicy.integrations.transformers.calls.padding_mask import is_foreign
from kvpolicy.integrations.transformers.logical_layer import LogicalLayer
from kvpolicy.stages import Geometry

_SPARE_SLOTS = 3  # slots without tokens, so that `update` returns views of a larger storage, as policies do
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}  # relative to the largest value; for 16-bit types see below
_HALF_PRECISION_TOLERANCE = 0.06

Attended = tuple[Tensor, Tensor | None]
States = tuple[Tensor, Tensor, Tensor, Tensor | None]  # query, key, value, mask


# One set per model being checked: ids of modules that called attention with keys of no managed layer.
other_callers: list[set[int]] = []


class CheckingLayer(LogicalLayer):
    """Replaces a managed layer in forwards of a few tokens. All errors are UnsupportedModelError.

    For every `update` there must be one attention call, by a module of this layer, with the same key and value tensors
    that `update` returned. It must compute softmax(scaling * Q K^T) V over the tokens, without pads, up to each query's
    own, because attention over a compressed cache computes that.
    """

    def __init__(self, index: int, geometry: Geometry, tokens: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index, self.geometry = index, geometry
        self.tokens = tokens  # [B, tokens of all forwards] bool, False for pads
        self.num_tokens: list[int] = []
        self.seq_len = 0
        self.updates = self.calls = 0  # in this forward
        self.module: nn.Module | None = None  # the attention module of this layer
        self.dtype: torch.dtype | None = None
        self._returned: tuple[Tensor, Tensor] | None = None
        self._storage: tuple[Tensor, ...] = ()

    def reset(self) -> None:
        self._refuse("the model empties its cache during a forward")

    def select_rows(self, rows: Sequence[int]) -> None:
        self._refuse(f"the model moves rows of its cache during a forward: {rows}")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate storage for all tokens. The entries must have the shape given by the configuration."""
        rows, expected = self.tokens.shape[0], (self.geometry.kv_heads, self.geometry.head_dim)
        for states in (key_states, value_states):
            shape = tuple(states.shape)
            if states.ndim != 4 or (shape[1], shape[3]) != expected or shape[0] != rows:
                self._refuse(f"(KV heads, head dim) must be {expected}, in {rows} rows: {shape}")
        slots = self.tokens.shape[1] + _SPARE_SLOTS
        self._storage = tuple(
            states.new_zeros((*states.shape[:2], slots, states.shape[3])) for states in (key_states, value_states)
        )
        self.dtype, self.is_initialized = key_states.dtype, True
        self.num_tokens = [0] * rows

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append entries [B, K, q, D]; returns all entries."""
        self.updates += 1
        if self.updates > 1:
            self._refuse(f"its cache is updated {self.updates} times in one forward")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.seq_len + key_states.shape[2]
        if end > self.tokens.shape[1]:
            raise ValueError(f"layer {self.index}: its cache takes more tokens than the forward has")  # not a refusal
        for buffer, states in zip(self._storage, (key_states, value_states), strict=True):
            buffer[:, :, self.seq_len : end] = states
        self.seq_len = end
        keys, values = (buffer[:, :, :end] for buffer in self._storage)
        keys.kvpolicy_layer = self  # type: ignore[attr-defined]
        self._returned = keys, values
        return keys, values

    def watch(
        self,
        stock: Callable[..., Attended],
        module: nn.Module,
        states: States,
        dropout: float,
        scaling: float | None,
        call: dict[str, Any],
    ) -> Attended:
        """Check an attention call of the model, run it, and compare its output."""
        self.calls += 1
        if self.calls > 1:
            self._refuse(f"attention is called {self.calls} times for one update of the cache")
        query, key, value, mask = states
        if self._returned is None or key is not self._returned[0] or value is not self._returned[1]:
            self._refuse("attention is called with other keys or values than the cache gave back")
        heads = self.geometry.query_heads
        if query.shape[1] != heads or query.shape[3] != self.geometry.head_dim:
            self._refuse(f"queries must have {heads} heads of {self.geometry.head_dim}: {tuple(query.shape)}")
        for name in changing(call, heads, query.shape[2], self.seq_len):
            self._refuse(f"its attention takes {name!r}, which cannot be carried across an eviction")
        if query.shape[2] == 1 and not module.training and is_foreign(mask):
            self._refuse("a mask of the model's own, made for one token, cannot be carried across an eviction")
        output = stock(module, *states, dropout=dropout, scaling=scaling, **call)
        plain = output if not dropout else stock(module, *states, dropout=0.0, scaling=scaling, **call)
        self._compare(plain[0], query, key, value, query.shape[-1] ** -0.5 if scaling is None else scaling)
        self.module = module
        return output

    def end(self) -> None:
        """End a forward."""
        if not self.updates:
            self._refuse("its cache is not updated by a forward")
        if not self.calls:
            self._refuse("its attention is not called through transformers' AttentionInterface")
        self.updates = self.calls = 0

    def _compare(self, output: Tensor, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        """Raise unless the output is that of causal attention over all tokens but pads."""
        expected = self._expected(query.float(), key.float(), value.float(), scaling).transpose(1, 2)
        if output.shape != expected.shape:
            self._refuse(f"attention gives {tuple(output.shape)} instead of {tuple(expected.shape)}")
        if output.device.type == "meta":
            return
        rows = self.tokens[:, self.seq_len - query.shape[2] : self.seq_len]
        difference = (output.float() - expected).abs()[rows]
        allowed = _TOLERANCE.get(output.dtype, _HALF_PRECISION_TOLERANCE) * value.float().abs().max().clamp(min=1e-6)
        if torch.is_autocast_enabled(query.device.type):
            allowed = _HALF_PRECISION_TOLERANCE * value.float().abs().max()
        if bool((difference > allowed).any()):  # false for NaN: the weights may be uninitialised
            self._refuse("its attention is more than a softmax of scaled products over the tokens up to a query's own")

    def _expected(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Causal attention [B, H, q, D] in float32."""
        count = query.shape[2]
        positions = torch.arange(self.seq_len, device=query.device)
        visible = positions <= positions[-count:, None]
        visible = visible[None] & self.tokens[:, None, : self.seq_len]
        with torch.autocast(query.device.type, enabled=False):
            logits = query @ key.repeat_interleave(self.geometry.group, 1).transpose(-1, -2) * scaling
            weights = logits.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
            return weights.nan_to_num() @ value.repeat_interleave(self.geometry.group, 1)

    def _refuse(self, reason: str) -> None:
        raise UnsupportedModelError(f"layer {self.index} cannot be managed: {reason}")
