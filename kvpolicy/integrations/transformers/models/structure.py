"""What a configuration tells of the model that it is for: the model is built without weights, and looked at."""

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
    """Raise UnsupportedModelError when a model of this configuration cannot be attached to, as far as can be seen.

    Not seen is what depends on numbers. A configuration for which there is no model class, or whose model cannot be
    built or run without weights, passes.
    """
    model = _without_weights(config)
    if model is None:
        return
    require_no_sinks(model)
    configs = configs_of(model)
    require_interface(model, configs)
    inspect_model(model, geometry, [(one, implementation_of(one)) for one in configs], device=_META)


def _without_weights(config: PretrainedConfig) -> PreTrainedModel | None:
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING):
        if type(config) in mapping:
            kind: Any = mapping[type(config)]
            try:
                with _META, torch.random.fork_rng(devices=[]):  # some constructors draw numbers, here for nothing
                    model: PreTrainedModel = (kind[0] if isinstance(kind, tuple) else kind)(copy.deepcopy(config))
            except Exception:  # noqa: BLE001 - a library that it needs is missing, or it cannot be made so
                return None
            model.eval()
            return model
    return None
