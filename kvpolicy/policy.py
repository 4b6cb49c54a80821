"""The public class `Policy`: load a policy, compile it for a model, attach it, calibrate it."""

import os

import attrs
import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from kvpolicy.errors import AttachError, one_line
from kvpolicy.integrations.transformers.attachment import Attachment, attached
from kvpolicy.integrations.transformers.cache import PolicyCache
from kvpolicy.integrations.transformers.calibrate import calibrate, calibrate_from_table
from kvpolicy.integrations.transformers.decode_graph.runners import mode_of
from kvpolicy.integrations.transformers.models.attention_modules import check_layers, reads_attention_modules
from kvpolicy.integrations.transformers.models.rotary import rotary_of, rotary_of_config
from kvpolicy.integrations.transformers.models.structure import check_structure, without_weights
from kvpolicy.integrations.transformers.models.support import check_model, device_of, geometry_of
from kvpolicy.integrations.transformers.saving.model_digest import model_digest
from kvpolicy.plan.calibration import Calibration
from kvpolicy.plan.head_table import read_head_table
from kvpolicy.plan.plan import Plan, compile_policy, needs_rotary
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
        """The name of the policy."""
        return self.spec.name

    @property
    def digest(self) -> str:
        """16 hex digits, equal exactly for policies that behave the same; for benchmark records."""
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

        `device` and `dtype` default to those of the model, and to cpu and float32 for a configuration.
        Raises UnsupportedModelError; CalibrationError; or PolicyError when the policy cannot be used with the model.
        """
        if isinstance(model, PretrainedConfig):
            geometry, measured = geometry_of(model), self._calibration(calibration, None)
            model_dtype = dtype or torch.float32
            if reads_attention_modules(self.spec):
                check_layers(self.spec, without_weights(model), geometry, live=False)
            rotary = rotary_of_config(model) if self.spec.calibrated or needs_rotary(self.spec) else None
            return compile_policy(self.spec, geometry, device or "cpu", model_dtype, rotary, measured)
        check_model(model)
        geometry, measured = geometry_of(model.config), self._calibration(calibration, model)
        check_layers(self.spec, model, geometry)
        model_device, model_dtype = device or device_of(model), dtype or model.dtype
        return compile_policy(self.spec, geometry, model_device, model_dtype, rotary_of(model), measured)

    def check(self, config: PretrainedConfig, calibration: CalibrationSource | None = None) -> None:
        """Raise the errors of `attach` that can be found from the model's configuration alone, without weights."""
        plan = self.compile(config, calibration=calibration)
        check_structure(config, plan.geometry)

    def attach(
        self, model: PreTrainedModel, *, calibration: CalibrationSource | None = None, graph: bool | str = False
    ) -> Attachment:
        """Use this policy in `model.generate`, until the attachment is detached or its `with` block ends.

        `calibration` is the result of `calibrate` for this model, or the file it was saved to; few policies need one.
        With `graph`, decode steps have fixed shapes and static storage, and run as CUDA graphs on a GPU; "compile"
        runs them with `torch.compile`. Raises UnsupportedModelError, PolicyError, CalibrationError or AttachError
        before the model is changed, or ParameterError for another value of `graph`.
        """
        mode = mode_of(graph)
        return Attachment(self.compile(model, calibration=calibration), model, mode)

    def calibrate(self, model: PreTrainedModel, tokens: Tensor) -> Calibration:
        """Calibrate the plugins of this policy that need it on token ids [S, T] without pads.

        Raises UnsupportedModelError, AttachError, or CalibrationError when none needs it or it fails.
        """
        return calibrate(self.spec, model, tokens)

    def calibrate_from_table(self, model: PreTrainedModel, path: "str | os.PathLike[str]") -> Calibration:
        """Calibrate from a file of a number for each layer and head, such as DuoAttention's gates.

        The file has a line a layer and a column a head, or is JSON `{"layer-head": [score of each run, ...], ...}`, as
        HeadKV's importances. Heads are KV heads (`duo`) or query heads (`headkv`).

        Raises CalibrationError for a file that is no such table of this model, and when the plugins read none.
        """
        return calibrate_from_table(self.spec, model, read_head_table(path), one_line(os.fsdecode(path)))

    def cache(self, model: PreTrainedModel, *, calibration: CalibrationSource | None = None) -> PolicyCache:
        """A cache with this policy, to pass as `past_key_values`.

        The model must have a policy attached, this one or another; the cache uses this one.
        """
        attachment = attached(model)
        if attachment is None:
            raise AttachError("attach a policy to the model first: without one, nothing is compressed")
        return attachment.adopt(PolicyCache(self.compile(model, calibration=calibration), model.config))

    def _calibration(self, source: CalibrationSource | None, model: PreTrainedModel | None) -> Calibration | None:
        """The calibration; None if no plugin needs one. Raises CalibrationError if for another policy or model."""
        if source is None or not self.spec.calibrated:
            return None
        measured = source if isinstance(source, Calibration) else Calibration.read(source)
        origin = "calibration" if isinstance(source, Calibration) else os.fsdecode(source)
        measured.require(self.spec, None if model is None else model_digest(model), origin)
        return measured


def load(source: "str | os.PathLike[str]", /, **overrides: object) -> Policy:
    """Load a policy from a file, or an installed policy by name; `overrides` replace top-level keys.

    `load("rkv", budget=512)`. Raises PolicyError with all errors of the file, UnknownPolicyError or InputError.
    """
    spec, origin = read_policy(source, **overrides)
    return Policy(spec, origin)
