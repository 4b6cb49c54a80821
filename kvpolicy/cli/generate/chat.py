"""`kvpolicy chat`: a conversation under a policy, on one cache from the first turn to the last."""

import re
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer

from kvpolicy.cli.generate.sampling import Seed, Temperature, TopK, TopP, sampling_of
from kvpolicy.cli.terminal.console import err, line, tell
from kvpolicy.cli.terminal.options import MODEL, Budget, Calibration, Device, Dtype, System, budget_override

_COMMAND = re.compile(r"/[a-z]+")


def chat(
    model: Annotated[str, typer.Argument(help=MODEL)],
    policy: Annotated[str | None, typer.Option(help="A policy's name, or a file; by default full.")] = None,
    budget: Budget = None,
    system: System = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to write at most in each turn.")] = 512,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    calibration: Calibration = None,
    device: Device = "cpu",
    dtype: Dtype = None,
) -> None:
    """Converse with a model under a policy: one line a message, from the terminal or stdin, until it ends or /exit.

    /report says what the policy holds. Each turn computes its own tokens only: what has been evicted stays evicted.
    """
    from kvpolicy.cli.generate.conversation import Conversation
    from kvpolicy.cli.terminal.models import device_of, dtype_of
    from kvpolicy.errors import InputError, one_line
    from kvpolicy.evaluate.models import config_of, load_model
    from kvpolicy.evaluate.models.text_encoding import has_template
    from kvpolicy.policy import load

    if max_new_tokens < 1:
        raise InputError(f"--max-new-tokens must be at least 1: {max_new_tokens}")
    choice = sampling_of(temperature, top_p, top_k, seed)
    loaded = load("kvpolicy:full" if policy is None else policy, **budget_override(budget))
    target, kind = device_of(device), dtype_of(dtype)
    loaded.check(config_of(model, tell), calibration)
    live, tokenizer = load_model(model, target, kind, tell)
    if not has_template(tokenizer):
        raise InputError(f"{one_line(model)}: has no chat template: use `kvpolicy run --raw`")
    with loaded.attach(live, calibration=calibration) as attachment:
        conversation = Conversation(live, tokenizer, attachment.cache(), system)
        for text in _lines():
            if text == "/exit":
                break
            if text == "/report":
                err().print(attachment.report().table())
            elif _COMMAND.fullmatch(text):
                line(f"no such command: {text}; there are /report and /exit", error=True)
            else:
                _answer(conversation, tokenizer, text, max_new_tokens, choice)


def _answer(conversation: Any, tokenizer: Any, text: str, max_new_tokens: int, choice: dict[str, Any]) -> None:
    from transformers import TextStreamer

    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    conversation.turn(text, max_new_tokens, streamer=streamer, **choice)


def _lines() -> Iterator[str]:
    """Messages without the white space around them; blank lines are none."""
    from kvpolicy.errors import InputError
    from kvpolicy.evaluate.data.files import decoded

    if sys.stdin is None:
        raise InputError("no stdin to read messages from")
    asking = sys.stdin.isatty()
    while True:
        if asking:
            typer.echo("> ", nl=False, err=True)
        data = sys.stdin.buffer.readline()  # whatever encoding the terminal has
        if not data:
            break
        if text := decoded(data, "stdin").strip():
            yield text
