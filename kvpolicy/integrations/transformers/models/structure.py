"""Checks of a configuration: its model is built without weights and inspected."""

import copy
from typing import Any

import torch
from transformers import PretrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

from kvpolicy.integrations.transformers.calls.attention_implementation import configs_of, implementation_of
from kvpolicy.integrations.transformers.models.guard import inspect_model
from kvpolicy.integrations.transformers.models.support import require_interface, require_no_sinks
from kvpolicy.stages import Geometry

_META = torch.device("meta")


def check_structure(config: PretrainedConfig, geometry: Geometry) -> None:
    """Raise UnsupportedModelError if a policy cannot be attached to a model of this configuration.

    Outputs are not compared, as there are no weights. A configuration without a model class, or whose model cannot be
    built or run without weights, passes.
    """
    model = without_weights(config)
    if model is None:
        return
    require_no_sinks(model)
    configs = configs_of(model)
    require_interface(model, configs)
    inspect_model(
        model,
        geometry,
        [(decoder_config, implementation_of(decoder_config)) for decoder_config in configs],
        device=_META,
    )


def without_weights(config: PretrainedConfig) -> PreTrainedModel | None:
    """The model of a configuration on the device meta; None if it has no model class or cannot be built there."""
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            model_class: Any = mapping[type(config)]
            try:
                with _META, torch.random.fork_rng(devices=[]):  # some constructors draw random numbers
                    model: PreTrainedModel = (model_class[0] if isinstance(model_class, tuple) else model_class)(
                        copy.deepcopy(config)
                    )
            except Exception:  # noqa: BLE001 - a library is missing, or it cannot be built on the meta device
                return None
            model.eval()
            return model
    return None
