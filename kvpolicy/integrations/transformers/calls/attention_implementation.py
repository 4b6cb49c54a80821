"""The attention function that a model was loaded with: called through our name, and found again behind it."""

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
NAME_KEY = "_attn_implementation_internal"  # where a configuration keeps the name of the attention function
EAGER = "eager"  # which transformers has no function for: every modeling file brings its own
SDPA = "sdpa"
_EAGER_FUNCTION = "eager_attention_forward"  # how the names of those functions end

Attention = Callable[..., Any]
Mask = Callable[..., Any]

_eager: "weakref.WeakKeyDictionary[type[nn.Module], Attention]" = weakref.WeakKeyDictionary()  # found so far


def name_for(original: str) -> str:
    """The name under which our attention stands in for the implementation `original`."""
    return NAME if original == SDPA else f"{NAME}_{original}"


def is_ours(name: object) -> bool:
    """Whether a configuration that names this implementation belongs to an attached model."""
    return isinstance(name, str) and (name == NAME or name.startswith(f"{NAME}_"))


def configs_of(model: PreTrainedModel) -> list[PretrainedConfig]:
    """The configurations by which the decoder's attention is looked up, each once.

    Vision and audio towers have others, and are left alone.
    """
    text = model.config.get_text_config(decoder=True)
    found = {id(text): text}
    for module in model.modules():
        config = getattr(module, "config", None)
        if type(config) is type(text) and hasattr(module, "layer_idx"):
            found[id(config)] = config
    return list(found.values())


def implementation_of(config: PretrainedConfig) -> str:
    """The implementation that a configuration names. Raises UnsupportedModelError when ours cannot stand in for it.

    It can where attention takes the masks that transformers makes for `eager` or `sdpa`; the others (flash, flex and
    paged attention) take masks, or none, that do not say which tokens are pads.
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
    """The function by which transformers makes the masks of an implementation that `implementation_of` gave."""
    found: Mask = ALL_MASK_ATTENTION_FUNCTIONS[name]
    return found


def attention_function(name: str, module: nn.Module) -> Attention:
    """The attention function that a module calls under an implementation of this name.

    Raises UnsupportedModelError when it is `eager`, and the function cannot be found.
    """
    if name == SDPA:
        return sdpa_attention_forward
    if name != EAGER:
        found: Attention = ALL_ATTENTION_FUNCTIONS[name]
        return found
    kind = type(module)
    function = _eager.get(kind) or next(_eager_functions(kind), None)
    if function is None:
        raise UnsupportedModelError(f"{type(module).__name__} has no eager attention function that could be found")
    _eager[kind] = function
    return function


def _eager_functions(kind: type[nn.Module]) -> Iterator[Attention]:
    """Those that the code of `forward` names, where that was written; then those of the files of the class."""
    forward = inspect.unwrap(kind.forward)
    code, written_in = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    for name in getattr(code, "co_names", ()):
        if name.endswith(_EAGER_FUNCTION) and callable(written_in.get(name)):
            yield written_in[name]
    for base in kind.__mro__:
        function = getattr(sys.modules.get(base.__module__), _EAGER_FUNCTION, None)
        if callable(function):
            yield function
