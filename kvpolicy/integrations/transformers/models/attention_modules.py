"""Checks that attention modules have what plugins read of them beside queries, keys and values."""

from collections.abc import Callable, Iterable, Iterator, Mapping

from torch import nn
from transformers import PreTrainedModel

from kvpolicy.errors import PolicyError, Problem, UnsupportedModelError
from kvpolicy.integrations.transformers.models.hidden_states import place_of
from kvpolicy.integrations.transformers.models.output_projection import weight_of
from kvpolicy.plan.plan import readers_of
from kvpolicy.spec.policy import PolicySpec
from kvpolicy.stages import Geometry

# By the name among `Needs`: what it is, and a call that raises UnsupportedModelError for a module without it.
_READ: Mapping[str, tuple[str, Callable[[nn.Module, Geometry, bool], object]]] = {
    "output_projection": (
        "the output projection of the model's attention, which is not known",
        lambda module, geometry, live: weight_of(module, geometry, live=live),
    ),
    "hidden_norms": (
        "the hidden states that the model's attention is given, which are not known",
        lambda module, _geometry, _live: place_of(module),
    ),
}


def reads_attention_modules(spec: PolicySpec) -> bool:
    """Whether a plugin of the policy reads anything of them."""
    return any(readers_of(spec, need) for need in _READ)


def check_layers(spec: PolicySpec, model: PreTrainedModel | None, geometry: Geometry, *, live: bool = True) -> None:
    """Raise PolicyError, by the keys of the plugins that read it, where a managed layer has not what they read.

    Its attention may be any module with the layer's index. `model` None = it could not be built; with `live=False` it
    may be without weights.
    """
    _raise(spec, lambda need: _missing_in_layers(need, model, geometry, live=live))


def check_attention_modules(spec: PolicySpec, attention: Iterable[nn.Module] | None, geometry: Geometry) -> None:
    """Raise PolicyError likewise, for the very modules that call attention; None = they could not be seen."""
    modules = None if attention is None else list(attention)
    _raise(spec, lambda need: _missing_in_modules(need, modules, geometry))


def _raise(spec: PolicySpec, missing: Callable[[str], str]) -> None:
    problems = list(_problems(spec, missing))
    if problems:
        raise PolicyError(problems)


def _problems(spec: PolicySpec, missing: Callable[[str], str]) -> Iterator[Problem]:
    for need, (what, _) in _READ.items():
        readers = readers_of(spec, need)
        why = missing(need) if readers else ""
        if why:
            yield from (Problem(key, f"{plugin.name} needs {what}: {why}") for key, plugin in readers.items())


def _missing_in_layers(need: str, model: PreTrainedModel | None, geometry: Geometry, *, live: bool) -> str:
    if model is None:
        return "the model of this configuration cannot be built"
    for index in geometry.managed:
        modules = [module for module in model.modules() if getattr(module, "layer_idx", None) == index]
        found = [why for module in modules if (why := _problem(need, module, geometry, live=live))]
        if len(found) == len(modules):
            return f"layer {index}: {found[0] if found else 'no module has its index'}"
    return ""


def _missing_in_modules(need: str, modules: list[nn.Module] | None, geometry: Geometry) -> str:
    if modules is None:
        return "the model could not be run before a policy was attached"
    found = (
        (index, _problem(need, module, geometry, live=True))
        for index, module in zip(geometry.managed, modules, strict=False)
    )
    return next((f"layer {index}: {why}" for index, why in found if why), "")


def _problem(need: str, attention: nn.Module, geometry: Geometry, *, live: bool) -> str:
    try:
        _READ[need][1](attention, geometry, live)
    except UnsupportedModelError as error:
        return str(error)
    return ""
