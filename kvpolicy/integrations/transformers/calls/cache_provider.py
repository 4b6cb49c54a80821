"""What stands on an attached model in place of the method by which `generate` gets its cache."""

from typing import TYPE_CHECKING, Any

from torch import Tensor
from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

from kvpolicy.errors import UnsupportedCallError
from kvpolicy.integrations.transformers.cache import PolicyCache
from kvpolicy.integrations.transformers.calls.forward_hooks import policy_cache_in

if TYPE_CHECKING:
    from kvpolicy.integrations.transformers.attachment import Attachment

PROVIDER = "_prepare_cache_for_generation"


class CacheProvider:
    """Gives `generate` the caches of an attachment.

    An object rather than a closure, so that a model can be copied and pickled while attached.
    """

    def __init__(self, attachment: "Attachment") -> None:
        self.attachment = attachment

    def __call__(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        """Put our cache into `model_kwargs`, or check the one that the caller gave."""
        given, prompt_end = model_kwargs.get("past_key_values"), _prompt_end(model_kwargs, generation_config)
        _require_dynamic(generation_config)
        if given is not None:
            self._check(given, generation_config, prompt_end)
            model = self.attachment.model
            getattr(type(model), PROVIDER)(model, generation_config, model_kwargs, *args, **kwargs)
        elif generation_config.use_cache is False:
            self.attachment.uncompressed.warn("use_cache=False: the policy has no cache to bound")
        elif generation_config.is_assistant:
            model_kwargs["past_key_values"] = draft = self.attachment.draft_cache()
            if isinstance(draft, PolicyCache):
                draft.expect_prompt(prompt_end)
            draft.activate_past_recording()
        else:
            model_kwargs["past_key_values"] = cache = self.attachment.cache()
            cache.expect_prompt(prompt_end)

    def _check(self, given: object, generation_config: GenerationConfig, prompt_end: int | None) -> None:
        if generation_config.is_assistant:  # its cache comes back every round, to be cropped
            if not isinstance(given, DynamicCache):
                raise _not_ours(given)
            if isinstance(given, PolicyCache):
                given.expect_prompt(prompt_end)
            return
        ours = policy_cache_in(given)
        if ours is None:
            raise _not_ours(given)
        ours.expect_prompt(prompt_end)
        ours.stop_recording()


def _prompt_end(model_kwargs: dict[str, Any], generation_config: GenerationConfig) -> int | None:
    """How many tokens the prompt of a generation ends behind, those in the cache included; None when not known."""
    mask = model_kwargs.get("attention_mask")
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask.shape[1]
    dropped = getattr(generation_config, "_mask_length", None)  # of a mask that hid nothing, so transformers dropped it
    if dropped is None and generation_config.max_new_tokens is not None:
        dropped = generation_config.max_length - generation_config.max_new_tokens
    return None if dropped is None else int(dropped)


def _require_dynamic(generation_config: GenerationConfig) -> None:
    wanted = generation_config.cache_implementation
    if wanted not in (None, "dynamic"):
        raise UnsupportedCallError(
            f"cache_implementation={wanted!r} cannot be had while a policy is attached: the policy brings its own cache"
        )


def _not_ours(given: object) -> UnsupportedCallError:
    return UnsupportedCallError(f"past_key_values must be a cache made by attachment.cache(): {type(given).__name__}")
