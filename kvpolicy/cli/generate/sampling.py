"""How tokens are chosen: greedily, or sampled as the options say."""

import math
from typing import Annotated, Any

import typer

from kvpolicy.errors import InputError

Temperature = Annotated[
    float | None, typer.Option(help="Sample, with logits divided by this. Without any option of sampling: greedily.")
]
TopP = Annotated[float | None, typer.Option(help="Sample among the likeliest tokens that make up this probability.")]
TopK = Annotated[int | None, typer.Option(help="Sample among so many of the likeliest tokens.")]
Seed = Annotated[int | None, typer.Option(help="Makes sampling repeatable.")]


def sampling_of(temperature: float | None, top_p: float | None, top_k: int | None, seed: int | None) -> dict[str, Any]:
    """Arguments for `generate`; seeds torch when a seed is given. Raises InputError."""
    if temperature is not None and not (math.isfinite(temperature) and temperature > 0):
        raise InputError(f"--temperature must be above 0; leave it out for the likeliest tokens: {temperature:g}")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"--top-p must be above 0 and at most 1: {top_p:g}")
    if top_k is not None and top_k < 1:
        raise InputError(f"--top-k must be at least 1: {top_k}")
    greedy = temperature is None and top_p is None and top_k is None
    if seed is not None:
        _seed(seed, greedy=greedy)
    if greedy:
        return {"do_sample": False}
    given = {"temperature": temperature, "top_p": top_p, "top_k": top_k}
    plain = {"temperature": 1.0, "top_p": 1.0, "top_k": 0}  # in place of what the model's own settings say
    return {"do_sample": True, **{name: plain[name] if value is None else value for name, value in given.items()}}


def _seed(seed: int, *, greedy: bool) -> None:
    import torch

    if greedy:
        raise InputError("--seed is for sampling: give --temperature, --top-p or --top-k, too")
    if not 0 <= seed < 2**63:
        raise InputError(f"--seed must be from 0 to {2**63 - 1}: {seed}")
    torch.manual_seed(seed)
