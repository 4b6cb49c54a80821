"""Measuring on a model what a policy needs to know about it."""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers import PreTrainedModel

from kvpolicy.errors import CalibrationError, ParameterError
from kvpolicy.integrations.transformers.attachment import Attachment
from kvpolicy.integrations.transformers.models.rotary import rotary_of
from kvpolicy.integrations.transformers.models.support import device_of, geometry_of, layer_count
from kvpolicy.integrations.transformers.saving.model_digest import model_digest
from kvpolicy.plan.calibration import Calibration
from kvpolicy.plan.plan import READ_ALL, compile_policy
from kvpolicy.spec.budget import Budget
from kvpolicy.spec.dump import calibrated_digest
from kvpolicy.spec.policy import NEVER, Allocate, Compress, PolicySpec, Protect, Weighted
from kvpolicy.stages import Geometry, Needs, Plugin, Sample
from kvpolicy.stages.checking.returned import check_tensor
from kvpolicy.stages.registry.hooks import PROJECT
from kvpolicy.stages.registry.plugins import registry


@torch.inference_mode()
def calibrate(spec: PolicySpec, model: PreTrainedModel, tokens: Tensor) -> Calibration:
    """What plugins of the policy measure on tokens [S, T], of which none is a pad, or on what they make of these.

    Raises CalibrationError when none of them needs it, or one cannot be calibrated on this model.
    """
    if not spec.calibrated:
        raise CalibrationError(f"policy {spec.name} needs no calibration")
    if tokens.ndim != 2 or tokens.shape[1] < 2:
        raise CalibrationError(f"must be given tokens [sequences, length >= 2]: {tuple(tokens.shape)}")
    layers: list[dict[str, Tensor]] = [{} for _ in geometry_of(model.config).managed]
    read: Tensor | None = None
    samples: list[Sample] = []
    for key, plugin in spec.calibrated.items():
        try:
            probes = _probes(plugin, tokens)
            if read is None or not torch.equal(probes, read):
                read, samples = probes, list(_samples(spec, model, probes))
            measured = plugin.calibrate(samples)
        except ParameterError as error:
            raise CalibrationError(f"policy {spec.name}: {key} {plugin.name}: {error}") from error
        for layer, tensors in zip(layers, measured, strict=True):
            layer.update({f"{key}.{name}": tensor.cpu() for name, tensor in tensors.items()})
    return Calibration(tuple(layers), calibrated_digest(spec), model_digest(model))


def calibrate_from_table(spec: PolicySpec, model: PreTrainedModel, table: Tensor, origin: str) -> Calibration:
    """What plugins of the policy make of a table of a number for each layer of the model and each head, float64.

    Columns are KV heads or query heads, as a plugin says. `origin` names the table in errors. Layers that the policy
    does not manage have a row, too, which nobody reads.

    Raises CalibrationError when none of them needs a calibration, or one reads no table, or not this one.
    """
    if not spec.calibrated:
        raise CalibrationError(f"policy {spec.name} needs no calibration")
    geometry, depth = geometry_of(model.config), layer_count(model.config)
    layers: list[dict[str, Tensor]] = [{} for _ in geometry.managed]
    for key, plugin in spec.calibrated.items():
        try:
            found = plugin.calibration_of(_of_managed(table, plugin, geometry, depth), geometry)
        except ParameterError as error:
            raise CalibrationError(f"{origin}: policy {spec.name}: {key} {plugin.name}: {error}") from error
        for layer, tensors in zip(layers, found, strict=True):
            layer.update({f"{key}.{name}": tensor for name, tensor in tensors.items()})
    return Calibration(tuple(layers), calibrated_digest(spec), model_digest(model))


def _of_managed(table: Tensor, plugin: Plugin, geometry: Geometry, depth: int) -> Tensor:
    """The rows of managed layers, of a table of all `depth` layers with the heads that the plugin reads."""
    by_query = plugin.table_of_query_heads
    heads = geometry.query_heads if by_query else geometry.kv_heads
    if table.shape != (depth, heads):
        raise ParameterError(
            f"the table must have {depth} layers of {heads} {'query' if by_query else 'KV'} heads, as the model: "
            f"it has {table.shape[0]} of {table.shape[1]}"
        )
    return table[list(geometry.managed)]


def _probes(plugin: Plugin, tokens: Tensor) -> Tensor:
    """The tokens that a plugin is calibrated on, checked."""
    probes = plugin.probes(tokens)
    return check_tensor(plugin, probes, dict(zip("ST", tokens.shape, strict=True)), tokens.dtype, tokens.device)


def _samples(spec: PolicySpec, model: PreTrainedModel, tokens: Tensor) -> Iterator[Sample]:
    """Each managed layer's queries, keys and values, of a forward in which everything is kept."""
    geometry, rotary, device = geometry_of(model.config), rotary_of(model), device_of(model)
    plan = compile_policy(_keeping_all(spec), geometry, device, model.dtype, rotary)
    plan = attrs.evolve(plan, needs=Needs(queries=tokens.shape[1]), observers=())
    with Attachment(plan, model) as attachment:
        cache = attachment.cache()
        model(tokens.to(device), past_key_values=cache, use_cache=True, logits_to_keep=1)
    for layer in cache.managed:
        queries, _ = layer.window.last(range(tokens.shape[0]))
        keys, values = layer.storage.all_states()
        if queries is not None:
            yield Sample(geometry, layer.scaling, rotary, queries, keys, values)


def _keeping_all(spec: PolicySpec) -> PolicySpec:
    """A policy that evicts nothing and needs no calibration itself."""

    def built_in(stage: str, name: str) -> Any:
        return registry().find(stage, name, PROJECT)()

    plain = {"select": "topk", "merge": "drop", "store": "plain", "read": READ_ALL}
    changes: dict[str, Any] = {stage: built_in(stage, name) for stage, name in plain.items()}
    changes |= {"score": (Weighted(built_in("score", "recency")),), "budget": Budget(share=Fraction(1))}
    changes |= {"allocate": Allocate(built_in("allocate.layers", "uniform"), built_in("allocate.heads", "uniform"))}
    return attrs.evolve(spec, compress=Compress(prefill=False, every=NEVER), protect=Protect(), **changes)
