"""All that attaching could leave behind."""

from transformers import PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

_OURS = "kvpolicy"


def of_model(model):
    """Attributes, hooks, configurations, weights and bound methods of a model and its parts."""
    configs = {id(part.config): part.config for part in model.modules() if isinstance(part, PreTrainedModel)}
    return {
        "attributes": {name: _attributes(part) for name, part in model.named_modules()},
        "configs": [{**config.to_dict(), **_plain(vars(config))} for config in configs.values()],
        "weights": {name: (tensor.data_ptr(), tensor._version) for name, tensor in model.state_dict().items()},
        "methods": {name: getattr(model, name) for name in ("forward", "generate", "_prepare_cache_for_generation")},
        "generation": model.generation_config.to_dict(),
        "training": model.training,
    }


def of_library():
    """The global registries of transformers, apart from our own key."""
    registries = (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    return [
        {
            name: function
            for registry in registries
            for name, function in {**registry._global_mapping, **registry._local_mapping}.items()
            if not name.startswith(_OURS)
        },
        dict(vars(DynamicLayer)),
    ]


def _attributes(part):
    hooks = {name: dict(value) for name, value in vars(part).items() if "hooks" in name}
    return {**_plain(vars(part)), **hooks, "names": sorted(vars(part))}


def _plain(values):
    return {name: value for name, value in values.items() if isinstance(value, (bool, int, float, str, type(None)))}
