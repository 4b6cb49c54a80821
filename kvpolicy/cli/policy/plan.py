"""`kvpolicy plan`: what a policy would do to a model, without loading the model."""

from typing import Annotated

import typer

from kvpolicy.cli.terminal.console import out, print_json, tell
from kvpolicy.cli.terminal.options import MODEL, Budget, Calibration, Dtype, Json, budget_override


def plan(
    policy: Annotated[str, typer.Argument(help="A policy's name, or a file.")],
    model: Annotated[str, typer.Option(help=f"{MODEL} Only its configuration is read.")] = "testbed",
    length: Annotated[int, typer.Option(help="Tokens that the sequence grows to.")] = 8192,
    budget: Budget = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, or a GPU by name: h200. Need not be present.")] = "cpu",
    dtype: Dtype = None,
    calibration: Calibration = None,
    json: Json = False,
) -> None:
    """Show budgets, bytes held and bytes moved for a model's shape."""
    import torch

    from kvpolicy.cli.terminal.models import dtype_of
    from kvpolicy.evaluate.models import config_of
    from kvpolicy.plan.explain import explain
    from kvpolicy.plan.explain.devices import device_named
    from kvpolicy.policy import load

    loaded, wanted = load(policy, **budget_override(budget)), dtype_of(dtype)
    config = config_of(model, tell)
    own = getattr(config.get_text_config(decoder=True), "dtype", None)
    kind = wanted or own or torch.float32
    rates = None if device.split(":")[0] in ("cpu", "cuda") else device_named(device)
    plan = loaded.compile(config, device="cuda" if rates else device, dtype=kind, calibration=calibration)
    explained = explain(plan, length, rates)
    print_json(explained.to_dict()) if json else out().print(explained.table())
