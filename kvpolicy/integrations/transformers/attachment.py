"""A plan bound to a live model, and how the model is given back as it was."""

import copy
import os
from collections.abc import Sequence
from types import TracebackType
from typing import Any, Self

from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache

from kvpolicy.cache.request.regions import Regions, Spans
from kvpolicy.errors import AttachError, SavedCacheError
from kvpolicy.integrations.transformers.attention_function import managed_modules, register
from kvpolicy.integrations.transformers.cache import PolicyCache
from kvpolicy.integrations.transformers.cache_owner import CacheOwner
from kvpolicy.integrations.transformers.calls.attention_implementation import (
    NAME_KEY,
    configs_of,
    implementation_of,
    is_ours,
    name_for,
)
from kvpolicy.integrations.transformers.calls.cache_provider import PROVIDER, CacheProvider
from kvpolicy.integrations.transformers.calls.forward_hooks import ForwardHooks
from kvpolicy.integrations.transformers.calls.uncompressed_forwards import UncompressedForwards
from kvpolicy.integrations.transformers.decode_graph.decode_forward import FORWARD, DecodeForward
from kvpolicy.integrations.transformers.decode_graph.limits import require_static
from kvpolicy.integrations.transformers.decode_graph.runners import Mode
from kvpolicy.integrations.transformers.models.attention_modules import check_attention_modules
from kvpolicy.integrations.transformers.models.guard import Restoring, inspect_model
from kvpolicy.integrations.transformers.models.support import check_model, require_interface
from kvpolicy.integrations.transformers.report import Report
from kvpolicy.integrations.transformers.saving import cache_file
from kvpolicy.integrations.transformers.saving.model_digest import model_digest
from kvpolicy.integrations.transformers.torch_modes import exact
from kvpolicy.plan.compress.kernel_errors import note_once
from kvpolicy.plan.plan import Plan

_COUNTED = "counted"
_RETIRED = (
    "the policy that this cache was made for has been detached from its model: what the cache holds cannot be "
    "attended to without it; attach a policy, and start with a new cache"
)


class Attachment:
    """While attached, `generate` runs in the memory that the policy allows. A context manager; or call `detach`.

    Three things change, all on this instance: the name of the attention function in the configuration of its decoder,
    where `generate` gets its cache from, and a hook before and one after its forward, which see to it that the cache
    that was given is the one in use; with `mode` a fourth, its `forward`. No weight, class or function of the library
    is touched. Before any of that the model is run on a few tokens, to see whether it uses its cache as a policy needs;
    `unchecked` says why, when it could not be run (None when it was).

    Raises AttachError, UnsupportedModelError, or PolicyError, for `mode` or the model; the model is then as it was. An
    interrupt, at whatever line of attaching or of `detach`, leaves the model as it was or attached as a whole.
    """

    def __init__(self, plan: Plan, model: PreTrainedModel, mode: Mode | None = None) -> None:
        check_model(model)
        _require_free(model)
        if mode is not None:
            require_static(plan, model)
        self._previous = [(config, vars(config)[NAME_KEY]) for config in configs_of(model)]
        originals = [(config, implementation_of(config)) for config, _ in self._previous]
        require_interface(model, [config for config, _ in self._previous])
        register(*(original for _, original in originals))
        inspected = inspect_model(model, plan.geometry, originals)
        if inspected.unchecked is not None:
            note_once(f"{type(model).__name__} was not run before a policy was attached: {inspected.unchecked}")
        check_attention_modules(plan.spec, inspected.modules, plan.geometry)
        self.plan = plan
        self.model = model
        self.unchecked = inspected.unchecked
        self.uncompressed = UncompressedForwards()
        self._names = [(config, name_for(original)) for config, original in originals]
        self._modules = list(_possible_modules(model, plan) if inspected.modules is None else inspected.modules)
        self._config = copy.deepcopy(model.config)  # what is changed in it later is not meant for caches
        self._cut = False  # whether a draft has been made with the first layers alone
        self._attention = list(inspected.modules or ())
        self._owner = CacheOwner(model, self._attention)
        self._hooks = ForwardHooks(self._owner, self.uncompressed)
        self._decode = None if mode is None else DecodeForward(plan, model, mode)
        self.complete = False
        with Restoring(self.undo, only_after_errors=True), Restoring(self.undo, only_after_errors=True):
            self._install()

    def cache(
        self, regions: "Regions | Spans | Sequence[Spans] | None" = None, tokens: Tensor | None = None
    ) -> PolicyCache:
        """A new cache for one batch, to be passed as `past_key_values`; `generate` makes its own without asking.

        It goes with this attachment: once that is detached, or on another model, it raises CacheError. `regions` name
        spans of the request, as `Regions.of` takes them. Raises RegionError when they are none, or when the policy
        protects one that is not among them.

        `tokens` are the ids of the first tokens of the request, [rows, n] or [n], for policies whose scorers read
        prompts again: give them where the model is not given ids (`inputs_embeds`), or is given more than ids (images).
        Other policies do not look at them. Raises ParameterError when they are none.
        """
        self._require_attached()
        self._uncut()
        cache = self._new_cache(None if regions is None else Regions.of(regions), tokens)
        self._owner.made(cache)
        return cache

    def load_cache(
        self, path: "str | os.PathLike[str]", rows: Sequence[int] | None = None, tokenizer: object = None
    ) -> PolicyCache:
        """A new cache from a file of `PolicyCache.save`, on the device of the model; `rows` as in `PolicyCache.fork`.

        `rows=[0] * 16` lets a prefix that was saved as one row serve a batch of 16. With `tokenizer` the file must have
        been saved with the same one.

        Raises SavedCacheError, before a cache is handed out, when there is no such file, when it is damaged, or when it
        was saved for another policy, calibration, model, geometry, dtype or tokenizer; CacheError for rows that it does
        not hold; ParameterError when `tokenizer` is none; AttachError after `detach`.
        """
        self._require_attached()
        self._uncut()
        model = model_digest(self.model, SavedCacheError)
        with exact(self.plan.device.type):
            cache = cache_file.read(path, self.plan, model, tokenizer, self._new_cache)
        cache.resume()
        chosen = cache if rows is None else cache.fork(rows)
        self._owner.made(chosen)
        return chosen

    def _new_cache(self, regions: Regions | None, tokens: Tensor | None = None) -> PolicyCache:
        return PolicyCache(self.plan, self._config, regions, tokens)

    def draft_cache(self) -> DynamicCache:
        """A cache for the drafts of assisted decoding, which may be made with the model's first layers alone."""
        layers = int(self.model.config.get_text_config(decoder=True).num_hidden_layers)
        if layers == self._layers:
            return self.cache()
        self._cut = True
        plan = self.plan.first(layers)
        if plan is None:
            return DynamicCache(config=self.model.config)
        cache = PolicyCache(plan, self.model.config)
        self._owner.adopt(cache)
        return cache

    def adopt(self, cache: PolicyCache) -> PolicyCache:
        """Let a cache of another policy run on this model, until this attachment is detached."""
        self._require_attached()
        self._owner.adopt(cache)
        return cache

    def report(self) -> Report:
        """What each managed layer saw and holds, for the cache that was made last, and what is held beside them.

        Forked and loaded caches count as made when they are.
        """
        static = 0
        if self._decode is not None:
            self._decode.flush()
            static = self._decode.nbytes
        counted = self._owner.counted
        if counted is None:
            return Report.of(self.plan, (), static_bytes=static, forwards_without_cache=self.uncompressed.forwards)
        counted.refresh()
        return Report.of(
            self.plan,
            counted.layers,
            stock_bytes=sum(counted.stock_bytes.values()),
            static_bytes=static,
            forwards_without_cache=self.uncompressed.forwards,
        )

    def detach(self) -> None:
        """Give the model back as it was. Raises AttachError when that has been done already.

        Caches that were handed out refuse to go on: without the policy's attention they would be read wrongly.
        """
        self._require_attached()
        with Restoring(self.undo), Restoring(self.undo):
            pass

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if attached(self.model) is self:
            self.detach()

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, _COUNTED: self._owner.counted}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A model that is copied or unpickled while attached comes with an attachment of its own."""
        self.__dict__.update({name: value for name, value in state.items() if name != _COUNTED})
        self._owner = self._hooks.owner = CacheOwner(self.model, self._attention)
        self._owner.counted = state[_COUNTED]
        register(*(name for _, name in self._previous if name is not None))
        self._mark()

    @property
    def _layers(self) -> int:
        return int(self._config.get_text_config(decoder=True).num_hidden_layers)

    def _require_attached(self) -> None:
        if attached(self.model) is not self:
            raise AttachError("this attachment has been detached")

    def _install(self) -> None:
        """The provider comes first: by it a model is known to be attached, and what is missing or left is found."""
        model = self.model
        model.__dict__[PROVIDER] = CacheProvider(self)
        for config, name in self._names:
            vars(config)[NAME_KEY] = name
        self._mark()
        model.register_forward_pre_hook(self._hooks.before, with_kwargs=True)
        model.register_forward_hook(self._hooks.after, with_kwargs=True)
        if self._decode is not None:
            model.__dict__[FORWARD] = self._decode
        self.complete = True

    def _mark(self) -> None:
        for module in self._modules:
            managed_modules[module] = self.uncompressed

    def undo(self) -> None:
        """Whatever of `_install` has been done. May be called again, from the start, after it was interrupted."""
        self.complete = False
        self._owner.retire(_RETIRED)
        _remove(self.model, self._hooks)
        for config, name in self._previous:
            vars(config)[NAME_KEY] = name
        for module in self._modules:
            managed_modules.pop(module, None)
        self._uncut()
        if self._decode is not None:
            self._decode.detach()
        provider = self.model.__dict__.get(PROVIDER)
        if isinstance(provider, CacheProvider) and provider.attachment is self:
            del self.model.__dict__[PROVIDER]

    def _uncut(self) -> None:
        """A draft that failed has left the configuration with the layers that it used."""
        if self._cut:
            self.model.config.get_text_config(decoder=True).num_hidden_layers = self._layers
            self._cut = False


def attached(model: PreTrainedModel) -> Attachment | None:
    """The attachment of a model, None when there is none."""
    provider = model.__dict__.get(PROVIDER)
    return provider.attachment if isinstance(provider, CacheProvider) else None


def _require_free(model: PreTrainedModel) -> None:
    present = attached(model)
    if present is not None and present.complete:
        raise AttachError("a policy is attached to this model already; detach it first")
    if present is not None:  # it was interrupted, and interrupted again while it was undone
        present.undo()
    if is_ours(vars(model.config.get_text_config(decoder=True))[NAME_KEY]):
        raise AttachError(
            "this model shares its configuration with a model that has a policy attached; "
            "give it its own: model.config = copy.deepcopy(model.config)"
        )


def _possible_modules(model: PreTrainedModel, plan: Plan) -> list[nn.Module]:
    """The modules that may be the attention of a managed layer, where that could not be seen."""
    return [module for module in model.modules() if getattr(module, "layer_idx", None) in plan.geometry.managed]


def _remove(model: nn.Module, hooks: ForwardHooks) -> None:
    """Take our hooks off, whichever of them are there."""
    for ours, name in ((hooks.before, "_forward_pre_hooks"), (hooks.after, "_forward_hooks")):
        for key in [key for key, hook in vars(model)[name].items() if hook == ours]:
            vars(model)[f"{name}_with_kwargs"].pop(key, None)
            del vars(model)[name][key]
