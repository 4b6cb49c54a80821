"""`kvpolicy run`: generate under a policy, and say afterwards what it did."""

import time
from pathlib import Path
from typing import Annotated, Any

import typer

from kvpolicy.cli.console import err, line, print_json, tell
from kvpolicy.cli.options import MODEL, Budget, Calibration, Device, Dtype, Json, budget_override
from kvpolicy.cli.prompt import read_prompt


def run(
    model: Annotated[str, typer.Argument(help=MODEL)],
    policy: Annotated[str | None, typer.Option(help="A policy's name, or a file; by default full.")] = None,
    budget: Budget = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt itself.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A file with the prompt; - is stdin, as without it.")] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most.")] = 256,
    calibration: Calibration = None,
    device: Device = "cpu",
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Generate greedily under a policy; the text goes to stdout as it is written, the report to stderr."""
    from kvpolicy.cli.models import device_of, dtype_of
    from kvpolicy.errors import InputError
    from kvpolicy.evaluate.models import config_of, load_model
    from kvpolicy.policy import load

    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens must be at least 1: {max_new_tokens}")
    loaded = load("kvpolicy:full" if policy is None else policy, **budget_override(budget))
    target, kind = device_of(device), dtype_of(dtype)
    text = read_prompt(prompt, prompt_file)
    loaded.check(config_of(model, tell), calibration)  # refuses what cannot go together before weights are read
    live, tokenizer = load_model(model, target, kind, tell)
    with loaded.attach(live, calibration=calibration) as attachment:
        result = _generate(live, tokenizer, attachment, text, max_new_tokens, stream=not json)
    if json:
        print_json({"model": model, "policy": loaded.name, "digest": loaded.digest, **result})


def _generate(
    model: Any, tokenizer: Any, attachment: Any, prompt: str, max_new_tokens: int, *, stream: bool
) -> dict[str, Any]:
    from transformers import TextStreamer

    inputs = _encode(tokenizer, prompt).to(model.device)
    _check_length(model, inputs["input_ids"].shape[1] + max_new_tokens)
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True) if stream else None
    started = time.perf_counter()
    written = model.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False, streamer=streamer)
    seconds, report = time.perf_counter() - started, attachment.report()
    new = written[0, inputs["input_ids"].shape[1] :]
    if stream:
        err().print(report.table())
        if not any(layer.compressions for layer in report.layers):
            line("nothing was evicted: the sequence never outgrew the budget", error=True)
        line(f"{len(new)} tokens in {seconds:.1f} s, {len(new) / seconds:.1f} tokens/s", error=True)
    text = tokenizer.decode(new, skip_special_tokens=True)
    return {"text": text, "new_tokens": len(new), "seconds": seconds, "report": report.to_dict()}


def _encode(tokenizer: Any, prompt: str) -> Any:
    from kvpolicy.errors import InputError, one_line

    try:
        inputs = tokenizer(prompt, return_tensors="pt")
    except Exception as error:  # tokenizers raises this very class, for a word that is not in its vocabulary
        raise InputError(f"the prompt has words that the tokenizer does not know: {one_line(error)}") from error
    if not inputs["input_ids"].shape[1]:
        raise InputError("the prompt has no tokens")
    return inputs


def _check_length(model: Any, length: int) -> None:
    from kvpolicy.errors import InputError

    most = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if most is not None and length > most:
        raise InputError(f"prompt and new tokens are {length} together, and the model knows {most} positions")
