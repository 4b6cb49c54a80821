"""Runs in a peer's environment, without kvpolicy: times `compress` of a kvpress press. JSON in, JSON out.

What is timed is what a press does after the prompt: it projects the newest hidden states to queries again, scores,
selects, and gathers keys and values.
"""

import json
import sys
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

import torch
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaAttention

_WINDOW = 32  # queries, as in our snapkv
_BEYOND_CACHES = 256 * 2**20  # bytes


def main() -> None:
    """Read a request from stdin, write the answer as one line to stdout."""
    request = json.load(sys.stdin)
    torch.set_num_threads(request["threads"])
    samples = timed(request)
    names = ("kvpress", "transformers", "torch")
    print(json.dumps({"samples": samples, "versions": {name: metadata.version(name) for name in names}}))  # noqa: T201


@torch.inference_mode()
def timed(request: dict[str, Any]) -> list[float]:
    """Seconds of every round."""
    import kvpress  # type: ignore[import-not-found]  # noqa: PLC0415 - there in this environment only

    device, dtype = torch.device(request["device"]), getattr(torch, request["dtype"])
    options: dict[str, Any] = {"compression_ratio": ratio_of(request["length"], request["kept"])}
    if request["press"] == "SnapKVPress":
        options.update(window_size=_WINDOW, kernel_size=7)
    press = getattr(kvpress, request["press"])(**options)
    attention, hidden, turned = layer(request, device, dtype)

    def normal() -> torch.Tensor:
        shape = (request["rows"], request["kv_heads"], request["length"], request["head_dim"])
        return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)

    keys, values = normal(), normal()

    def call() -> object:
        return press.compress(attention, hidden, keys, values, None, {"position_embeddings": turned})

    if call()[0].shape[2] != request["kept"]:  # type: ignore[index]
        raise ValueError(f"{request['press']} does not keep {request['kept']} entries")
    clock = _device_seconds if device.type == "cuda" else _host_seconds
    scratch = torch.ones(_BEYOND_CACHES // 4, dtype=torch.float32, device=device) if device.type == "cuda" else None
    seconds = [clock(call, scratch) for _ in range(request["warm_up"] + request["rounds"])]
    return seconds[request["warm_up"] :]


def ratio_of(length: int, kept: int) -> float:
    """The share that a press is told to remove so that exactly `kept` remain: it rounds down."""
    ratio = 1 - kept / length
    while int(length * (1 - ratio)) < kept:
        ratio -= 1e-9
    return ratio


def layer(
    request: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> tuple[torch.nn.Module, torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
    """An attention layer, its newest hidden states [B, W + 1, hidden], and cosines and sines for them."""
    heads, dim = request["query_heads"], request["head_dim"]
    config = LlamaConfig(
        hidden_size=heads * dim,
        num_attention_heads=heads,
        num_key_value_heads=request["kv_heads"],
        head_dim=dim,
    )
    attention = LlamaAttention(config, layer_idx=0).to(device=device, dtype=dtype)
    hidden = torch.randn(request["rows"], _WINDOW + 1, heads * dim, device=device, dtype=dtype)
    angles = torch.randn(1, _WINDOW + 1, dim, device=device, dtype=dtype)
    return attention, hidden, (angles.cos(), angles.sin())


def _host_seconds(call: Callable[[], object], _scratch: object) -> float:
    started = time.perf_counter()
    call()
    return time.perf_counter() - started


def _device_seconds(call: Callable[[], object], scratch: Any) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    scratch.add_(1)
    start.record()
    call()
    end.record()
    end.synchronize()
    return float(start.elapsed_time(end)) / 1e3


if __name__ == "__main__":
    main()
