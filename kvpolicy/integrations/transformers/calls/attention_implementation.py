"""Names of kvpolicy's attention implementations, and the original attention functions that they replace."""

import inspect
import sys
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from kvpolicy.errors import UnsupportedModelError

NAME = "kvpolicy"
NAME_KEY = "_attn_implementation_internal"  # attribute of a configuration with the name of its attention implementation
EAGER = "eager"  # not registered in transformers: every modeling file defines its own function
SDPA = "sdpa"
_EAGER_FUNCTION = "eager_attention_forward"  # suffix of the names of these functions

Attention = Callable[..., Any]
Mask = Callable[..., Any]

_eager_cache: "weakref.WeakKeyDictionary[type[nn.Module], Attention]" = weakref.WeakKeyDictionary()  # by module class


def name_for(original: str) -> str:
    """The name of kvpolicy's attention for models loaded with the implementation `original`."""
    return NAME if original == SDPA else f"{NAME}_{original}"


def is_ours(name: object) -> bool:
    """Whether the name is of kvpolicy's attention: the model is attached."""
    return isinstance(name, str) and (name == NAME or name.startswith(f"{NAME}_"))


def configs_of(model: PreTrainedModel) -> list[PretrainedConfig]:
    """The distinct configurations that select the attention implementation of the decoder.

    Vision and audio towers have other configurations, which are not changed.
    """
    text = model.config.get_text_config(decoder=True)
    configs = {id(text): text}
    for module in model.modules():
        config = getattr(module, "config", None)
        if type(config) is type(text) and hasattr(module, "layer_idx"):
            configs[id(config)] = config
    return list(configs.values())


def implementation_of(config: PretrainedConfig) -> str:
    """The implementation named by a configuration. Raises UnsupportedModelError if kvpolicy cannot replace it.

    Supported are implementations with the masks of `eager` or `sdpa`. Masks of the others (flash, flex and paged
    attention) do not tell which tokens are pads.
    """
    name = vars(config).get(NAME_KEY)
    takes_masks = ALL_MASK_ATTENTION_FUNCTIONS.get(name) in (eager_mask, sdpa_mask)
    if not takes_masks or (name != EAGER and name not in ALL_ATTENTION_FUNCTIONS):
        raise UnsupportedModelError(
            f"the attention implementation {name!r} cannot be kept while a policy is attached; "
            "load the model with attn_implementation='sdpa' or 'eager', or call model.set_attn_implementation('sdpa')"
        )
    return str(name)


def mask_function(name: str) -> Mask:
    """The mask function of transformers for an implementation returned by `implementation_of`."""
    function: Mask = ALL_MASK_ATTENTION_FUNCTIONS[name]
    return function


def attention_function(name: str, module: nn.Module) -> Attention:
    """The attention function that a module calls for an implementation of this name.

    Raises UnsupportedModelError if it is `eager` and the function cannot be found.
    """
    if name == SDPA:
        return sdpa_attention_forward
    if name != EAGER:
        registered: Attention = ALL_ATTENTION_FUNCTIONS[name]
        return registered
    module_class = type(module)
    function = _eager_cache.get(module_class) or next(_eager_functions(module_class), None)
    if function is None:
        raise UnsupportedModelError(f"{type(module).__name__} has no eager attention function that could be found")
    _eager_cache[module_class] = function
    return function


def _eager_functions(module_class: type[nn.Module]) -> Iterator[Attention]:
    """Eager functions named in the code of `forward`, then those in the modules of the class and its bases."""
    forward = inspect.unwrap(module_class.forward)
    code, written_in = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    for name in getattr(code, "co_names", ()):
        if name.endswith(_EAGER_FUNCTION) and callable(written_in.get(name)):
            yield written_in[name]
    for base in module_class.__mro__:
        function = getattr(sys.modules.get(base.__module__), _EAGER_FUNCTION, None)
        if callable(function):
            yield function
