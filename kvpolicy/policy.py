"""The public face of a policy: read it, attach it, look at what it would do."""

import os

import attrs
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from kvpolicy.errors import AttachError
from kvpolicy.integrations.transformers.attachment import Attachment, attached
from kvpolicy.integrations.transformers.cache import PolicyCache
from kvpolicy.integrations.transformers.calibrate import calibrate
from kvpolicy.integrations.transformers.decode_graph.runners import mode_of
from kvpolicy.integrations.transformers.models.rotary import rotary_of, rotary_of_config
from kvpolicy.integrations.transformers.models.structure import check_structure
from kvpolicy.integrations.transformers.models.support import check_model, device_of, geometry_of
from kvpolicy.integrations.transformers.saving.model_digest import model_digest
from kvpolicy.plan.calibration import Calibration
from kvpolicy.plan.plan import Plan, compile_policy
from kvpolicy.spec.dump import digest, to_yaml
from kvpolicy.spec.load import read_policy
from kvpolicy.spec.policy import PolicySpec

CalibrationSource = Calibration | str | os.PathLike[str]


@attrs.frozen
class Policy:
    """A checked policy. Immutable: one may be attached to many models, in many threads, at once."""

    spec: PolicySpec
    origin: str = attrs.field(default="", eq=False)  # the file it was read from

    @property
    def name(self) -> str:
        """The word to know it by."""
        return self.spec.name

    @property
    def digest(self) -> str:
        """Equal for two policies exactly when they do the same; for benchmark records."""
        return digest(self.spec)

    def to_yaml(self) -> str:
        """The policy as YAML; loading it gives an equal policy."""
        return to_yaml(self.spec)

    def compile(
        self,
        model: PreTrainedModel | PretrainedConfig,
        *,
        device: str | torch.device | None = None,
        dtype: torch.dtype | None = None,
        calibration: CalibrationSource | None = None,
    ) -> Plan:
        """The plan for a model or its configuration, without attaching.

        Device and dtype are those of the model, and cpu and float32 for a configuration, unless given.
        Raises UnsupportedModelError; CalibrationError; or PolicyError when the policy does not go with the model.
        """
        if isinstance(model, PretrainedConfig):
            geometry, measured = geometry_of(model), self._calibration(calibration, None)
            kind, rotary = dtype or torch.float32, rotary_of_config(model) if self.spec.store.calibrated else None
            return compile_policy(self.spec, geometry, device or "cpu", kind, rotary, measured)
        check_model(model)
        geometry, measured = geometry_of(model.config), self._calibration(calibration, model)
        place, kind = device or device_of(model), dtype or model.dtype
        return compile_policy(self.spec, geometry, place, kind, rotary_of(model), measured)

    def check(self, config: PretrainedConfig, calibration: CalibrationSource | None = None) -> None:
        """Raise what `attach` would raise, as far as the configuration of a model tells; no weights are needed."""
        plan = self.compile(config, calibration=calibration)
        check_structure(config, plan.geometry)

    def attach(
        self, model: PreTrainedModel, *, calibration: CalibrationSource | None = None, graph: bool | str = False
    ) -> Attachment:
        """Let `model.generate` run under this policy, until the attachment is detached or its `with` block ends.

        `calibration` is what `calibrate` gave for this model, or the file it was saved to; few stores need one. With
        `graph` decode steps have fixed shapes in storages that never move, and on a GPU become CUDA graphs; "compile"
        has `torch.compile` do them. Raises UnsupportedModelError, PolicyError, CalibrationError or AttachError before
        anything has changed, or ParameterError for another `graph`.
        """
        mode = mode_of(graph)
        return Attachment(self.compile(model, calibration=calibration), model, mode)

    def calibrate(self, model: PreTrainedModel, tokens: Tensor) -> Calibration:
        """Measure on token ids [S, T] what the store of this policy needs; no pads among them.

        Raises UnsupportedModelError, AttachError, or CalibrationError when it needs nothing or cannot be measured.
        """
        return calibrate(self.spec, model, tokens)

    def cache(self, model: PreTrainedModel, *, calibration: CalibrationSource | None = None) -> PolicyCache:
        """A cache under this policy, for those who pass `past_key_values` themselves.

        The model must have a policy attached, this one or another: the cache follows its own.
        """
        attachment = attached(model)
        if attachment is None:
            raise AttachError("attach a policy to the model first: without it nothing would be compressed")
        return attachment.adopt(PolicyCache(self.compile(model, calibration=calibration), model.config))

    def _calibration(self, given: CalibrationSource | None, model: PreTrainedModel | None) -> Calibration | None:
        """What was given, if the store needs one; raises CalibrationError unless it is for this policy and model."""
        if given is None or not self.spec.store.calibrated:
            return None
        measured = given if isinstance(given, Calibration) else Calibration.read(given)
        origin = "calibration" if isinstance(given, Calibration) else os.fsdecode(given)
        measured.require(self.spec, None if model is None else model_digest(model), origin)
        return measured


def load(source: "str | os.PathLike[str]", /, **overrides: object) -> Policy:
    """A policy from a file, or an installed one by its name; `overrides` replace top-level keys.

    `load("rkv", budget=512)`. Raises PolicyError with every problem of the file, UnknownPolicyError or InputError.
    """
    spec, origin = read_policy(source, **overrides)
    return Policy(spec, origin)
