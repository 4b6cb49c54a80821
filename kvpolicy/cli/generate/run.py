"""`kvpolicy run`: generate under a policy, and say afterwards what it did."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpolicy.cli.generate.sampling import Seed, Temperature, TopK, TopP, sampling_of
from kvpolicy.cli.terminal.console import err, line, print_json, tell
from kvpolicy.cli.terminal.options import MODEL, Budget, Calibration, Device, Dtype, Json, System, budget_override
from kvpolicy.cli.terminal.prompt import read_prompt


def run(
    model: Annotated[str, typer.Argument(help=MODEL)],
    policy: Annotated[str | None, typer.Option(help="A policy's name, or a file; by default full.")] = None,
    budget: Budget = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt itself.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with the prompt; - is stdin, as without it.")] = None,
    system: System = None,
    raw: Annotated[bool, typer.Option("--raw", help="Give the prompt as it is, without the chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    calibration: Calibration = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Generate under a policy; the text goes to stdout as it is written, the report to stderr.

    The prompt is put into the model's chat template, where it has one. Tokens are chosen greedily, or sampled.
    """
    from kvpolicy.cli.terminal.models import device_of, dtype_of
    from kvpolicy.errors import InputError
    from kvpolicy.evaluate.models import config_of, load_model
    from kvpolicy.policy import load

    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens must be at least 1: {max_new_tokens}")
    if raw and system is not None:
        raise InputError("--system goes into the chat template: leave out --raw, or write it into the prompt")
    choice = sampling_of(temperature, top_p, top_k, seed)
    loaded = load("kvpolicy:full" if policy is None else policy, **budget_override(budget))
    target, kind = device_of(device), dtype_of(dtype)
    text = read_prompt(prompt, prompt_file)
    loaded.check(config_of(model, tell), calibration)  # refuses what cannot go together before weights are read
    live, tokenizer = load_model(model, target, kind, tell)
    ids = _ids(tokenizer, text, system, raw=raw)
    with loaded.attach(live, calibration=calibration) as attachment:
        result = _generate(live, tokenizer, attachment, ids, max_new_tokens, choice, stream=not json)
    if json:
        print_json({"model": model, "policy": loaded.name, "digest": loaded.digest, **result})


def _ids(tokenizer: Any, prompt: str, system: str | None, *, raw: bool) -> list[int]:
    from kvpolicy.cli.generate.tokens import encoded, opening
    from kvpolicy.errors import InputError
    from kvpolicy.evaluate.models.text_encoding import has_template, rendered

    if raw or not has_template(tokenizer):
        if system is not None:
            raise InputError("--system: this model has no chat template: write it into the prompt")
        return encoded(tokenizer, prompt, special=True)
    messages = [*opening(system), {"role": "user", "content": prompt}]
    return encoded(tokenizer, rendered(tokenizer, messages), special=False)


def _generate(
    model: Any,
    tokenizer: Any,
    attachment: Any,
    ids: list[int],
    max_new_tokens: int,
    choice: dict[str, Any],
    *,
    stream: bool,
) -> dict[str, Any]:
    import torch
    from transformers import TextStreamer

    from kvpolicy.cli.generate.tokens import check_length

    check_length(model, len(ids) + max_new_tokens)
    tokens = torch.tensor([ids], device=model.device)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    started = time.perf_counter()
    written = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=max_new_tokens,
        streamer=streamer,
        **choice,
    )
    seconds, report = time.perf_counter() - started, attachment.report()
    new = written[0, len(ids) :]
    if stream:
        err().print(report.table())
        if not any(layer.compressions for layer in report.layers):
            line("nothing was evicted: the sequence never outgrew the budget", error=True)
        line(f"{len(new)} tokens in {seconds:.1f} s, {len(new) / seconds:.1f} tokens/s", error=True)
    text = tokenizer.decode(new, skip_special_tokens=True)
    return {"text": text, "new_tokens": len(new), "seconds": seconds, "report": report.to_dict()}
