"""The weights that training starts from: random, but with attention that already prefers and passes on equal content.

Queries start as noisy copies of their group's keys, so a token attends to tokens like itself; outputs start as the
transposes of the values, so what is attended to is added in the embedding's own directions. Both are what trained
attention tends to (Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers", arXiv:2305.09828).
"""

import torch
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaAttention

EMBEDDING_SPREAD, LOGIT_SCALE, QUIET = 1.0, 0.05, 1.0
LIKENESS = 0.7


@torch.no_grad()
def initialise(model: LlamaForCausalLM) -> None:
    """Overwrite the weights of ``model`` in place; draws from torch's global generator."""
    spread = model.config.hidden_size**-0.5
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            quiet = QUIET if "down_proj" in name else 1.0
            torch.nn.init.normal_(weight, std=EMBEDDING_SPREAD if "embed" in name else quiet * spread)
    model.model.norm.weight.fill_(LOGIT_SCALE)
    for layer in model.model.layers:
        _mimic(layer.self_attn)


def _mimic(attention: LlamaAttention) -> None:
    dim, groups = attention.head_dim, attention.num_key_value_groups
    keys = attention.k_proj.weight.unflatten(0, (-1, dim)).repeat_interleave(groups, dim=0).flatten(0, 1)
    values = attention.v_proj.weight.unflatten(0, (-1, dim)).repeat_interleave(groups, dim=0).flatten(0, 1)
    noise = (1 - LIKENESS**2) ** 0.5
    attention.q_proj.weight.copy_(LIKENESS * keys + noise * attention.q_proj.weight)
    attention.o_proj.weight.copy_(values.T)
