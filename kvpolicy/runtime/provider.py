"""What stands on an attached model in place of the method by which `generate` gets its cache."""

from typing import TYPE_CHECKING, Any

from transformers import GenerationConfig
from transformers.cache_utils import DynamicCache

from kvpolicy.errors import UnsupportedCallError
from kvpolicy.runtime.forwards import policy_cache_in

if TYPE_CHECKING:
    from kvpolicy.runtime.attachment import Attachment

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
        given = model_kwargs.get("past_key_values")
        _require_dynamic(generation_config)
        if given is not None:
            self._check(given, generation_config)
            model = self.attachment.model
            getattr(type(model), PROVIDER)(model, generation_config, model_kwargs, *args, **kwargs)
        elif generation_config.use_cache is False:
            self.attachment.misses.warn("use_cache=False: the policy has no cache to bound")
        elif generation_config.is_assistant:
            model_kwargs["past_key_values"] = self.attachment.draft_cache()
            model_kwargs["past_key_values"].activate_past_recording()
        else:
            model_kwargs["past_key_values"] = self.attachment.cache()

    def _check(self, given: object, generation_config: GenerationConfig) -> None:
        if generation_config.is_assistant:  # its cache comes back every round, to be cropped
            if not isinstance(given, DynamicCache):
                raise _not_ours(given)
            return
        ours = policy_cache_in(given)
        if ours is None:
            raise _not_ours(given)
        ours.stop_recording()


def _require_dynamic(generation_config: GenerationConfig) -> None:
    wanted = generation_config.cache_implementation
    if wanted not in (None, "dynamic"):
        raise UnsupportedCallError(
            f"cache_implementation={wanted!r} cannot be had while a policy is attached: the policy brings its own cache"
        )


def _not_ours(given: object) -> UnsupportedCallError:
    return UnsupportedCallError(f"past_key_values must be a cache made by attachment.cache(): {type(given).__name__}")
