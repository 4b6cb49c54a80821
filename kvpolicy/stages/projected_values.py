"""How long values are behind the output projection of the attention."""

import torch
from torch import Tensor

_PRODUCTS = 2**24  # numbers of projected values that exist at one time: 64 MiB


def output_norms(values: Tensor, projection: Tensor, order: int = 2) -> Tensor:
    """‖v W_g‖ of every value v, for the slice W_g of each query head g of the GQA group; float32 [B, K, G, T].

    Some slots are projected at one time, not all. Costs H · Dv · C products for every slot.

    Args:
        values: [B, K, T, Dv].
        projection: [H, Dv, C], the weight that follows attention, without its bias.
        order: 1 = the sum of the magnitudes of the C output channels, 2 = the Euclidean norm.
    """
    rows, kv_heads = values.shape[:2]
    weight = projection.float().unflatten(0, (kv_heads, -1))  # [K, G, Dv, C]
    width = max(1, _PRODUCTS // max(1, rows * weight[:, :, 0].numel()))
    blocks = [
        torch.linalg.vector_norm(torch.einsum("bktd,kgdc->bkgtc", block.float(), weight), order, -1)
        for block in values.split(width, 2)
    ]
    return torch.cat(blocks, 3)
