"""Which arguments of an attention call change its result over a compressed cache."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

# Names in models and in the attention functions of transformers.
_LOGITS = ("softcap", "logit_softcapping", "attn_logit_softcapping", "logits_soft_cap", "score_mod", "head_mask")
_BIASES = ("position_bias", "attn_bias", "attention_bias", "bias", "alibi", "alibi_bias", "relative_position_bias")
_SINKS = ("s_aux", "sinks", "sink", "attention_sink")
_HIDING = ("sliding_window", "window_size", "block_mask", "mask_mod", "attn_mask", "indices", "topk_indices", "seq_idx")
_PACKED = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k", "max_length_q")
_CHANGING = frozenset((*_LOGITS, *_BIASES, *_SINKS, *_HIDING, *_PACKED, "max_length_k", "output_attentions"))


def changing(call: Mapping[str, Any], heads: int, queries: int, keys: int | None = None) -> Iterator[str]:
    """Names of arguments, besides q, k, v, mask, dropout and scaling, that a compressed cache does not support.

    Known names that change logits, add or hide entries, or request the weights are reported, unless the value is None
    or False; `is_causal` is reported if it is False. Unknown names are reported only for bool and float tensors that
    are shaped like a mask or a bias, [..., 1 or `queries`, `keys`] or [rows, `keys`], or that have one number per query
    head (`heads`). `keys` is the number of tokens seen, including those of this call; None if it is not known.
    """
    for name, value in call.items():
        if name == "is_causal":
            if value is not None and not value:
                yield name
        elif isinstance(value, Tensor):
            if name in _CHANGING or _is_like_a_bias(value, heads, queries, keys):
                yield name
        elif name in _CHANGING and value is not None and value is not False:
            yield name


def _is_like_a_bias(value: Tensor, heads: int, queries: int, keys: int | None) -> bool:
    if not value.is_floating_point() and value.dtype != torch.bool:
        return False
    if value.ndim > 0 and value.numel() == heads > 1:
        return True
    if keys is None or value.ndim < 2 or value.shape[-1] != keys:
        return False
    return value.ndim == 2 or value.shape[-2] in (1, queries)
