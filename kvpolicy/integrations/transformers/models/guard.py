"""Checks that a model uses its cache as kvpolicy assumes, by running it on a few tokens."""

import contextlib
import inspect
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any

import attrs
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from kvpolicy.errors import UnsupportedModelError
from kvpolicy.integrations.transformers.calls.attention_implementation import NAME_KEY, name_for
from kvpolicy.integrations.transformers.models.checking_layer import CheckingLayer, other_callers
from kvpolicy.integrations.transformers.models.model_snapshot import Snapshot
from kvpolicy.integrations.transformers.models.sample_tokens import sample_tokens
from kvpolicy.integrations.transformers.models.support import device_of, runs_elsewhere
from kvpolicy.stages import Geometry

_PROMPT, _STEP, _PADS = 5, 1, 2  # tokens of the two forwards, and left pads of the second row
_TOKEN_TYPE_ARGUMENTS = ("token_type_ids", "mm_token_type_ids")  # required by some models in training mode
# Hooks of these libraries are part of the model; others are observers, which must not see the guard's forwards.
_LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "optimum", "kvpolicy")

_STANCE_LOCK = threading.Lock()


@attrs.frozen
class GuardResult:
    """The result of a check."""

    unchecked: str | None = None  # why the model was not run; None = it was
    modules: tuple[nn.Module, ...] | None = None  # the attention modules of the managed layers; None = not known
    dtype: torch.dtype | None = None  # of the keys


class CheckingCache(DynamicCache):
    """A dynamic cache whose managed layers are checked."""

    def __init__(self, config: PretrainedConfig, geometry: Geometry, tokens: Tensor) -> None:
        super().__init__(config=config)
        for index in geometry.managed:
            self.layers[index] = CheckingLayer(index, geometry, tokens)

    def require_no_others(self) -> None:
        """Raise UnsupportedModelError if a layer with full attention that is not managed has entries."""
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer and layer.is_initialized:
                raise UnsupportedModelError(f"layer {index} cannot be managed: the configuration does not count it")

    @property
    def watched(self) -> list[CheckingLayer]:
        """The managed layers."""
        return [layer for layer in self.layers if isinstance(layer, CheckingLayer)]


class Restoring:
    """A context that calls `undo` at its end. Two nested ones call it even if an interrupt hits the first call."""

    def __init__(self, undo: Callable[[], None], *, only_after_errors: bool = False) -> None:
        self.undo, self.only_after_errors = undo, only_after_errors

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error_type is not None or not self.only_after_errors:
            self.undo()


def inspect_model(
    model: PreTrainedModel,
    geometry: Geometry,
    originals: Sequence[tuple[PretrainedConfig, str]],
    device: torch.device | None = None,
) -> GuardResult:
    """Run the model on a prompt of a few tokens, with and without pads, and on one more token.

    `originals` are the configurations of the decoder and their attention implementations. The model and the random
    generators are restored. Raises UnsupportedModelError, with the layer and the reason, if the model does not call
    attention once per update of a managed layer, or if a forward fails. On the `device` meta, outputs are not compared
    and failures of forwards are ignored.
    """
    reason = runs_elsewhere(model) if device is None else None
    if reason is not None:
        return GuardResult(unchecked=reason)
    snapshot, callers = Snapshot(model), set[int]()

    def undo() -> None:
        snapshot.restore()
        other_callers[:] = [seen for seen in other_callers if seen is not callers]

    def prepare(*, with_hooks: bool) -> None:
        snapshot.restore()
        snapshot.spare_buffers(model)
        if not with_hooks:
            _remove_foreign_hooks(model)
        for config, original in originals:
            vars(config)[NAME_KEY] = name_for(original)

    with Restoring(undo), Restoring(undo), _without_compilation(), torch.no_grad():
        other_callers.append(callers)
        result = _try_forwards(model, geometry, prepare, device or device_of(model))
        for index, module in zip(geometry.managed, result.modules or (), strict=False):
            if id(module) in callers:
                raise UnsupportedModelError(
                    f"layer {index} cannot be managed: its attention is called with keys of its cache and with others"
                )
        return result


def _try_forwards(
    model: PreTrainedModel, geometry: Geometry, prepare: Callable[..., None], device: torch.device
) -> GuardResult:
    """Run the model in several ways until one does not fail. An UnsupportedModelError is final."""
    valid_tokens = torch.ones(2, _PROMPT + _STEP, dtype=torch.bool, device=device)
    valid_tokens[1, :_PADS] = False
    attempts: list[tuple[nn.Module, Tensor, bool]] = [
        (model, valid_tokens, False),
        (model, valid_tokens[:1], False),
        (model, valid_tokens[:1], True),
    ]
    # The whole model may require an image.
    attempts += [(decoder, valid_tokens[:1], False) for decoder in _decoders(model)]
    failures: list[Exception] = []
    for runnable, rows, with_hooks in attempts:
        prepare(with_hooks=with_hooks)
        try:
            return _run(model, runnable, geometry, rows)
        except UnsupportedModelError:
            raise
        except Exception as error:  # noqa: BLE001 - models may raise anything
            failures.append(error)
    if device.type == "meta":
        return GuardResult(unchecked="it cannot be run without weights")
    raise UnsupportedModelError(
        f"{type(model).__name__} cannot be run on a few tokens with a cache: "
        f"{type(failures[0]).__name__}: {str(failures[0])[:200]}"
    ) from failures[0]


def _decoders(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The language models inside a model."""
    text = model.config.get_text_config(decoder=True)
    submodels = (
        submodel for submodel in model.modules() if isinstance(submodel, PreTrainedModel) and submodel is not model
    )
    return [submodel for submodel in submodels if submodel.config is text and model.config is not text]


def _run(model: PreTrainedModel, runnable: nn.Module, geometry: Geometry, valid_tokens: Tensor) -> GuardResult:
    tokens = sample_tokens(model, valid_tokens.shape[0], valid_tokens.shape[1], valid_tokens.device)
    cache = CheckingCache(model.config, geometry, valid_tokens)
    for new_tokens in (slice(0, _PROMPT), slice(_PROMPT, _PROMPT + _STEP)):
        options: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        if valid_tokens.shape[0] > 1:
            options["attention_mask"] = valid_tokens[:, : new_tokens.stop].long()
        runnable(input_ids=tokens[:, new_tokens], **options, **_training_arguments(runnable, tokens[:, new_tokens]))
        for layer in cache.watched:
            layer.end()
        cache.require_no_others()
    layers = cache.watched
    modules = tuple(layer.module for layer in layers if layer.module is not None)
    return GuardResult(modules=modules, dtype=layers[0].dtype)


def _training_arguments(model: nn.Module, tokens: Tensor) -> Mapping[str, Tensor]:
    """Arguments that some models require in training mode: all tokens are text."""
    if not model.training:
        return {}
    names = inspect.signature(type(model).forward).parameters
    return {name: torch.zeros_like(tokens) for name in _TOKEN_TYPE_ARGUMENTS if name in names}


def _remove_foreign_hooks(model: nn.Module) -> None:
    for module in model.modules():
        for hooks in (vars(module)["_forward_hooks"], vars(module)["_forward_pre_hooks"]):
            for key in [key for key, hook in hooks.items() if not _is_of_a_library(hook)]:
                del hooks[key]


def _is_of_a_library(hook: Any) -> bool:
    hook = getattr(hook, "func", hook)
    written_in = getattr(hook, "__module__", None) or type(hook).__module__
    return str(written_in).partition(".")[0] in _LIBRARIES


@contextlib.contextmanager
def _without_compilation() -> Iterator[None]:
    """Run parts of the model that are wrapped by `torch.compile` without compiling them.

    The stance is global to the process, so only one thread at a time may change it.
    """
    with _STANCE_LOCK, torch.compiler.set_stance("force_eager"):
        yield
