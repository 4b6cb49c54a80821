"""A plan bound to a live model, and how the model is given back as it was."""

import warnings
from collections.abc import Iterator
from types import TracebackType
from typing import Any, Self

from torch import Tensor
from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel

from kvpolicy.errors import AttachError, UncompressedWarning, UnsupportedCallError, UnsupportedModelError
from kvpolicy.plan.plan import Plan
from kvpolicy.runtime.attention import NAME, managed_modules, register
from kvpolicy.runtime.cache import PolicyCache
from kvpolicy.runtime.report import Report
from kvpolicy.runtime.static.decode import FORWARD, DecodeForward
from kvpolicy.runtime.static.limits import require_static
from kvpolicy.runtime.static.runners import Mode
from kvpolicy.runtime.stats import LayerStats
from kvpolicy.runtime.support import check_model

_PROVIDER = "_prepare_cache_for_generation"  # the method by which `generate` gets its cache
_NAME_KEY = "_attn_implementation_internal"  # where a configuration keeps the name of the attention function


class Attachment:
    """While attached, `generate` runs in the memory that the policy allows. A context manager; or call `detach`.

    Two things change, both on this instance: the name of its attention function, and where `generate` gets its cache
    from; with `mode` a third, its `forward`. No weight, class or global function is touched.
    """

    def __init__(self, plan: Plan, model: PreTrainedModel, mode: Mode | None = None) -> None:
        check_model(model)
        _require_free(model)
        if mode is not None:
            require_static(plan, model)
        self.plan = plan
        self.model = model
        self._stats: list[LayerStats] = []
        self._previous = [(config, vars(config)[_NAME_KEY]) for config in _configs(model)]
        register()
        try:
            model.set_attn_implementation(NAME)
            _require_ours(model)
        except BaseException:
            self._restore()
            raise
        self._modules = [m for m in model.modules() if getattr(m, "layer_idx", None) in plan.geometry.managed]
        managed_modules.update(self._modules)
        model.__dict__[_PROVIDER] = CacheProvider(self)
        self._decode = None if mode is None else DecodeForward(plan, model, mode)
        if self._decode is not None:
            model.__dict__[FORWARD] = self._decode

    def cache(self) -> PolicyCache:
        """A new cache for one batch, to be passed as `past_key_values`; `generate` makes its own without asking."""
        self._require_attached()
        cache = PolicyCache(self.plan, self.model.config)
        self._stats = cache.stats
        return cache

    def report(self) -> Report:
        """What each managed layer saw and holds, for the cache that was made last."""
        if self._decode is not None:
            self._decode.flush()
        return Report.of(self.plan, self._stats)

    def detach(self) -> None:
        """Give the model back as it was. Raises AttachError when that has been done already."""
        self._require_attached()
        del self.model.__dict__[_PROVIDER]
        for module in self._modules:
            managed_modules.discard(module)
        self._restore()
        if self._decode is not None:
            self._decode.detach()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if attached(self.model) is self:
            self.detach()

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A model that is copied or unpickled while attached comes with an attachment of its own."""
        self.__dict__.update(state)
        register()
        managed_modules.update(self._modules)

    def _require_attached(self) -> None:
        if attached(self.model) is not self:
            raise AttachError("this attachment has been detached")

    def _restore(self) -> None:
        for config, name in self._previous:
            vars(config)[_NAME_KEY] = name


class CacheProvider:
    """Stands on an attached model in place of the method that makes a cache for `generate`.

    An object rather than a closure, so that a model can be copied and pickled while attached.
    """

    def __init__(self, attachment: Attachment) -> None:
        self.attachment = attachment

    def __call__(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Put our cache into `model_kwargs`, or check the one that the caller gave."""
        given, mask = model_kwargs.get("past_key_values"), model_kwargs.get("attention_mask")
        prompt_end = mask.shape[1] if isinstance(mask, Tensor) and mask.ndim == 2 else None
        if mask is None and generation_config.max_new_tokens is not None:  # a mask that hides nothing has been dropped
            prompt_end = generation_config.max_length - generation_config.max_new_tokens
        _require_dynamic(generation_config)
        if given is not None:
            _require_policy_cache(given)
            given.expect_prompt(prompt_end)
            if not generation_config.is_assistant:  # the assistant's cache comes back every round, to be cropped
                given.stop_recording()
            model = self.attachment.model
            getattr(type(model), _PROVIDER)(model, generation_config, model_kwargs, *args, **kwargs)
        elif generation_config.use_cache is False:
            warnings.warn("use_cache=False: the policy has no cache to bound", UncompressedWarning, stacklevel=4)
        else:
            model_kwargs["past_key_values"] = self.attachment.cache()
            model_kwargs["past_key_values"].expect_prompt(prompt_end)
            if generation_config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()


def attached(model: PreTrainedModel) -> Attachment | None:
    """The attachment of a model, None when there is none."""
    provider = model.__dict__.get(_PROVIDER)
    return provider.attachment if isinstance(provider, CacheProvider) else None


def _require_free(model: PreTrainedModel) -> None:
    if attached(model) is not None:
        raise AttachError("a policy is attached to this model already; detach it first")
    if vars(model.config)[_NAME_KEY] == NAME:
        raise AttachError(
            "this model shares its configuration with a model that has a policy attached; "
            "give it its own: model.config = copy.deepcopy(model.config)"
        )


def _require_ours(model: PreTrainedModel) -> None:
    text = model.config.get_text_config(decoder=True)
    if vars(text)[_NAME_KEY] != NAME:
        raise UnsupportedModelError(
            f"{type(model).__name__} does not call its attention through transformers' AttentionInterface"
        )


def _configs(model: PreTrainedModel) -> Iterator[PretrainedConfig]:
    found = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}
    waiting = list(found.values())
    while waiting:
        config = waiting.pop()
        yield config
        for name in config.sub_configs:
            below = getattr(config, name, None)
            if below is not None and id(below) not in found:
                found[id(below)] = below
                waiting.append(below)


def _require_dynamic(generation_config: GenerationConfig) -> None:
    wanted = generation_config.cache_implementation
    if wanted not in (None, "dynamic"):
        raise UnsupportedCallError(
            f"cache_implementation={wanted!r} cannot be had while a policy is attached: the policy brings its own cache"
        )


def _require_policy_cache(given: object) -> None:
    if not isinstance(given, PolicyCache):
        raise UnsupportedCallError(
            f"past_key_values must be a cache made by attachment.cache(): {type(given).__name__}"
        )
