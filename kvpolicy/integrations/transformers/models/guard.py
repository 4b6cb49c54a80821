"""Whether a live model uses its cache as kvpolicy assumes: found out by running it on a few tokens."""

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

_PROMPT, _STEP, _PADS = 5, 1, 2  # tokens of the two forwards, and pads before those of the second row
_TYPES_OF_TOKENS = ("token_type_ids", "mm_token_type_ids")  # which some models demand while they train
# Hooks of libraries are part of how a model runs; others watch it, and are not shown what the guard does.
_LIBRARIES = ("torch", "transformers", "accelerate", "deepspeed", "peft", "bitsandbytes", "optimum", "kvpolicy")

_ONE_AT_A_TIME = threading.Lock()


@attrs.frozen
class GuardResult:
    """What a run of the guard found."""

    unchecked: str | None = None  # why the model was not run
    modules: tuple[nn.Module, ...] | None = None  # the attention modules of the managed layers; None = not known
    dtype: torch.dtype | None = None  # of the keys


class CheckingCache(DynamicCache):
    """The model's own cache, whose managed layers are watched."""

    def __init__(self, config: PretrainedConfig, geometry: Geometry, real: Tensor) -> None:
        super().__init__(config=config)
        for index in geometry.managed:
            self.layers[index] = CheckingLayer(index, geometry, real)

    def require_no_others(self) -> None:
        """Raise UnsupportedModelError when a layer that is not managed has taken entries that nothing bounds."""
        for index, layer in enumerate(self.layers):
            if type(layer) is DynamicLayer and layer.is_initialized:
                raise UnsupportedModelError(f"layer {index} cannot be managed: the configuration does not count it")

    @property
    def watched(self) -> list[CheckingLayer]:
        """The managed layers."""
        return [layer for layer in self.layers if isinstance(layer, CheckingLayer)]


class Restoring:
    """A `with` block after which something is undone. Entered twice, it is undone though an interrupt falls into it."""

    def __init__(self, undo: Callable[[], None], *, only_after_errors: bool = False) -> None:
        self.undo, self.only_after_errors = undo, only_after_errors

    def __enter__(self) -> None:
        return None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None or not self.only_after_errors:
            self.undo()


def inspect_model(
    model: PreTrainedModel,
    geometry: Geometry,
    originals: Sequence[tuple[PretrainedConfig, str]],
    device: torch.device | None = None,
) -> GuardResult:
    """Run the model on a prompt of a few tokens, padded and not, and on one token more.

    `originals` are the configurations of the decoder and the attention implementations that they name. The model is
    left as it was, random generators included. Raises UnsupportedModelError, naming the layer and what was found, when
    it does not call attention once for each update of a managed layer, or when a forward fails. On the `device` meta,
    where there are no numbers, they are not looked at, and a forward that fails tells nothing.
    """
    why = runs_elsewhere(model) if device is None else None
    if why is not None:
        return GuardResult(unchecked=why)
    snapshot, others = Snapshot(model), set[int]()

    def undo() -> None:
        snapshot.restore()
        other_callers[:] = [seen for seen in other_callers if seen is not others]

    def prepare(*, with_hooks: bool) -> None:
        snapshot.restore()
        snapshot.spare_buffers(model)
        if not with_hooks:
            _set_foreign_hooks_aside(model)
        for config, original in originals:
            vars(config)[NAME_KEY] = name_for(original)

    with Restoring(undo), Restoring(undo), _eagerly(), torch.no_grad():
        other_callers.append(others)
        found = _look(model, geometry, prepare, device or device_of(model))
        for index, module in zip(geometry.managed, found.modules or (), strict=False):
            if id(module) in others:
                raise UnsupportedModelError(
                    f"layer {index} cannot be managed: its attention is called with keys of its cache and with others"
                )
        return found


def _look(
    model: PreTrainedModel, geometry: Geometry, prepare: Callable[..., None], device: torch.device
) -> GuardResult:
    """The first of several ways to run the model that does not fail. What is found in one of them is final."""
    real = torch.ones(2, _PROMPT + _STEP, dtype=torch.bool, device=device)
    real[1, :_PADS] = False
    ways: list[tuple[nn.Module, Tensor, bool]] = [
        (model, real, False),
        (model, real[:1], False),
        (model, real[:1], True),
    ]
    ways += [(decoder, real[:1], False) for decoder in _decoders(model)]  # a model may insist on an image
    failures: list[Exception] = []
    for runnable, rows, with_hooks in ways:
        prepare(with_hooks=with_hooks)
        try:
            return _run(model, runnable, geometry, rows)
        except UnsupportedModelError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a model raises says that it cannot be run
            failures.append(error)
    if device.type == "meta":
        return GuardResult(unchecked="it cannot be run without weights")
    raise UnsupportedModelError(
        f"{type(model).__name__} cannot be run on a few tokens with a cache: "
        f"{type(failures[0]).__name__}: {str(failures[0])[:200]}"
    ) from failures[0]


def _decoders(model: PreTrainedModel) -> list[PreTrainedModel]:
    """The language models inside of a model."""
    text = model.config.get_text_config(decoder=True)
    parts = (part for part in model.modules() if isinstance(part, PreTrainedModel) and part is not model)
    return [part for part in parts if part.config is text and model.config is not text]


def _run(model: PreTrainedModel, runnable: nn.Module, geometry: Geometry, real: Tensor) -> GuardResult:
    tokens = sample_tokens(model, real.shape[0], real.shape[1], real.device)
    cache = CheckingCache(model.config, geometry, real)
    for new in (slice(0, _PROMPT), slice(_PROMPT, _PROMPT + _STEP)):
        options: dict[str, Any] = {"past_key_values": cache, "use_cache": True}
        if real.shape[0] > 1:
            options["attention_mask"] = real[:, : new.stop].long()
        runnable(input_ids=tokens[:, new], **options, **_demanded(runnable, tokens[:, new]))
        for layer in cache.watched:
            layer.end()
        cache.require_no_others()
    found = cache.watched
    modules = tuple(layer.module for layer in found if layer.module is not None)
    return GuardResult(modules=modules, dtype=found[0].dtype)


def _demanded(model: nn.Module, tokens: Tensor) -> Mapping[str, Tensor]:
    """What some models want to be told while they train: that all tokens are text."""
    if not model.training:
        return {}
    names = inspect.signature(type(model).forward).parameters
    return {name: torch.zeros_like(tokens) for name in _TYPES_OF_TOKENS if name in names}


def _set_foreign_hooks_aside(model: nn.Module) -> None:
    for module in model.modules():
        for hooks in (vars(module)["_forward_hooks"], vars(module)["_forward_pre_hooks"]):
            for key in [key for key, hook in hooks.items() if not _is_of_a_library(hook)]:
                del hooks[key]


def _is_of_a_library(hook: Any) -> bool:
    hook = getattr(hook, "func", hook)
    written_in = getattr(hook, "__module__", None) or type(hook).__module__
    return str(written_in).partition(".")[0] in _LIBRARIES


@contextlib.contextmanager
def _eagerly() -> Iterator[None]:
    """Nothing is compiled for these few tokens, though parts of the model may be meant to be.

    Stances are those of the process: two threads that set and reset one would leave the other's behind.
    """
    with _ONE_AT_A_TIME, torch.compiler.set_stance("force_eager"):
        yield
