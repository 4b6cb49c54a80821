"""A cache layer that keeps everything and checks how a model uses it."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kvpolicy.errors import UnsupportedModelError
from kvpolicy.integrations.transformers.calls.attention_arguments import changing
from kvpolicy.integrations.transformers.calls.padding_mask import is_foreign
from kvpolicy.integrations.transformers.logical_layer import LogicalLayer
from kvpolicy.stages import Geometry

_SPARE = 3  # slots that no token gets, so that what `update` returns is a part of a larger storage, as it will be
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3}  # of the largest value; 16-bit types get the one below
_COARSE = 0.06

Attended = tuple[Tensor, Tensor | None]
States = tuple[Tensor, Tensor, Tensor, Tensor | None]  # query, key, value, mask


# Where models are being watched: the ids of modules that called attention with keys of no managed layer.
other_callers: list[set[int]] = []


class CheckingLayer(LogicalLayer):
    """Stands in for a managed layer in a forward of a few tokens. All errors are UnsupportedModelError.

    For every `update` there must be one attention call, by a module of this layer, with the very keys and values that
    `update` returned; and it must compute softmax(scaling * Q K^T) V over the real tokens up to each query's own, which
    is what attention over a compressed cache computes.
    """

    def __init__(self, index: int, geometry: Geometry, real: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.index, self.geometry = index, geometry
        self.tokens = real  # [B, all tokens that will come] bool: no pads
        self.num_tokens: list[int] = []
        self.seq_len = 0
        self.updates = self.calls = 0  # of this forward
        self.module: nn.Module | None = None  # that attends to this layer
        self.dtype: torch.dtype | None = None
        self._given: tuple[Tensor, Tensor] | None = None
        self._storage: tuple[Tensor, ...] = ()

    def reset(self) -> None:
        self._refuse("the model empties its cache during a forward")

    def select_rows(self, rows: Sequence[int]) -> None:
        self._refuse(f"the model moves rows of its cache during a forward: {rows}")

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make storage for all tokens. The entries must have the shape that the configuration says."""
        rows, expected = self.tokens.shape[0], (self.geometry.kv_heads, self.geometry.head_dim)
        for states in (key_states, value_states):
            found = tuple(states.shape)
            if states.ndim != 4 or (found[1], found[3]) != expected or found[0] != rows:
                self._refuse(f"(KV heads, head dim) must be {expected}, in {rows} rows: {found}")
        slots = self.tokens.shape[1] + _SPARE
        self._storage = tuple(
            states.new_zeros((*states.shape[:2], slots, states.shape[3])) for states in (key_states, value_states)
        )
        self.dtype, self.is_initialized = key_states.dtype, True
        self.num_tokens = [0] * rows

    def update(self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append [B, K, q, D]; gives back all there is."""
        self.updates += 1
        if self.updates > 1:
            self._refuse(f"its cache is updated {self.updates} times in one forward")
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        end = self.seq_len + key_states.shape[2]
        if end > self.tokens.shape[1]:
            raise ValueError(f"layer {self.index}: its cache takes more tokens than the forward has")  # a failure
        for held, states in zip(self._storage, (key_states, value_states), strict=True):
            held[:, :, self.seq_len : end] = states
        self.seq_len = end
        keys, values = (held[:, :, :end] for held in self._storage)
        keys.kvpolicy_layer = self  # type: ignore[attr-defined]
        self._given = keys, values
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
        """The attention call of the model itself, once it has been found to be as expected."""
        self.calls += 1
        if self.calls > 1:
            self._refuse(f"attention is called {self.calls} times for one update of the cache")
        query, key, value, mask = states
        if self._given is None or key is not self._given[0] or value is not self._given[1]:
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
        """The forward is over."""
        if not self.updates:
            self._refuse("its cache is not updated by a forward")
        if not self.calls:
            self._refuse("its attention is not called through transformers' AttentionInterface")
        self.updates = self.calls = 0

    def _compare(self, output: Tensor, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> None:
        """Raise unless the output is that of plain causal attention over real tokens."""
        expected = self._expected(query.float(), key.float(), value.float(), scaling).transpose(1, 2)
        if output.shape != expected.shape:
            self._refuse(f"attention gives {tuple(output.shape)} instead of {tuple(expected.shape)}")
        if output.device.type == "meta":
            return
        rows = self.tokens[:, self.seq_len - query.shape[2] : self.seq_len]
        difference = (output.float() - expected).abs()[rows]
        allowed = _TOLERANCE.get(output.dtype, _COARSE) * value.float().abs().max().clamp(min=1e-6)
        if torch.is_autocast_enabled(query.device.type):
            allowed = _COARSE * value.float().abs().max()
        if bool((difference > allowed).any()):  # not where a number is NaN: such weights tell nothing
            self._refuse("its attention is more than a softmax of scaled products over the tokens up to a query's own")

    def _expected(self, query: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """Plain causal attention [B, H, q, D] in float32."""
        count = query.shape[2]
        places = torch.arange(self.seq_len, device=query.device)
        visible = places <= places[-count:, None]
        visible = visible[None] & self.tokens[:, None, : self.seq_len]
        with torch.autocast(query.device.type, enabled=False):
            logits = query @ key.repeat_interleave(self.geometry.group, 1).transpose(-1, -2) * scaling
            weights = logits.masked_fill(~visible[:, None], -torch.inf).softmax(-1)
            return weights.nan_to_num() @ value.repeat_interleave(self.geometry.group, 1)

    def _refuse(self, what: str) -> None:
        raise UnsupportedModelError(f"layer {self.index} cannot be managed: {what}")
