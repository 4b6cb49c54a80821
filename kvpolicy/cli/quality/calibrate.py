"""`kvpolicy calibrate`: measure on a model what a policy needs to know about it."""

from pathlib import Path
from typing import Annotated, Any

import typer

from kvpolicy.cli.terminal.console import line, print_json, tell
from kvpolicy.cli.terminal.options import MODEL, Device, Dtype, Json
from kvpolicy.cli.terminal.prompt import read_prompt


def calibrate(
    policy: Annotated[str, typer.Argument(help="A policy's name, or a file.")],
    model: Annotated[str, typer.Option(help=MODEL)],
    text: Annotated[
        Path | None, typer.Option(help="A file with text such as the model will see; - is stdin. By default essays.")
    ] = None,
    table: Annotated[
        Path | None,
        typer.Option(help='In place of a text, published numbers: lines of layers, or JSON {"layer-head": [scores]}.'),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The file to write; by default POLICY.safetensors.")] = None,
    sequences: Annotated[int, typer.Option(help="Sequences to cut from the text, at most.")] = 16,
    length: Annotated[int, typer.Option(help="Tokens of a sequence, at most.")] = 1024,
    device: Device = "cpu",
    dtype: Dtype = None,
    json: Json = False,
) -> None:
    """Measure a model on a text, and write what the policy must know about it as a safetensors file.

    What others have measured or trained for each head, such as DuoAttention's gates and HeadKV's importances, is taken
    from a table.
    """
    from kvpolicy.cli.terminal.models import device_of, dtype_of
    from kvpolicy.errors import CalibrationError, InputError, one_line
    from kvpolicy.evaluate.models import load_model
    from kvpolicy.policy import load

    if sequences < 1 or length < 2:
        raise InputError(f"--sequences must be at least 1, --length at least 2: {sequences}, {length}")
    loaded, target, kind = load(policy), device_of(device), dtype_of(dtype)
    if not loaded.spec.calibrated:
        raise CalibrationError(f"policy {loaded.name} needs no calibration")
    if text is not None and table is not None:
        raise InputError("give --text or --table, one of them")
    words = "" if table is not None else _essays(model) if text is None else read_prompt(None, text)
    live, tokenizer = load_model(model, target, kind, tell)
    if table is not None:
        measured, numbers, how = loaded.calibrate_from_table(live, table), {}, f"from {one_line(table)}"
    else:
        tokens = _cut(tokenizer, words, sequences, length)
        measured = loaded.calibrate(live, tokens)
        numbers = {"sequences": tokens.shape[0], "length": tokens.shape[1]}
        how = f"measured on {tokens.numel()} tokens"
    path = out or Path(f"{loaded.name}.safetensors")
    measured.save(path)
    about = {"file": str(path), "policy": loaded.name, "plugins": measured.plugins, "model": measured.model}
    if json:
        print_json({**about, **numbers, "layers": len(measured.layers)})
    else:
        line(f"{path}: {loaded.name} {how} of {model}; give it as calibration")


def _essays(model: str) -> str:
    """What `evaluate` calibrates on, too, for a user who has no text. Raises InputError."""
    from kvpolicy.errors import InputError
    from kvpolicy.evaluate.data.texts import essays, held_back
    from kvpolicy.evaluate.models import TESTBED

    if model == TESTBED:
        raise InputError("--model testbed: knows no essays; give --text or --table")
    return "\n\n".join(text.text for text in held_back(essays(tell)))


def _cut(tokenizer: Any, text: str, sequences: int, length: int) -> Any:
    """Token ids [S, T]: the text cut into sequences of one length, what is left over dropped."""
    from kvpolicy.errors import InputError, one_line

    try:
        ids = tokenizer(text, return_tensors="pt")["input_ids"][0]
    except Exception as error:  # tokenizers raises this very class, for a word that is not in its vocabulary
        raise InputError(f"the text has words that the tokenizer does not know: {one_line(error)}") from error
    if len(ids) < 2:
        raise InputError("the text has fewer than 2 tokens")
    length = min(length, len(ids))
    count = min(sequences, len(ids) // length)
    return ids[: count * length].reshape(count, length)
