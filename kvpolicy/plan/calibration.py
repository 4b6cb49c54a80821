"""What a policy has measured on a model before it can be used: a safetensors file with digests inside."""

import os
from collections.abc import Mapping

import attrs
from torch import Tensor

from kvpolicy.errors import CalibrationError, shown
from kvpolicy.plan.tensor_file import TensorFiles, digest_of
from kvpolicy.spec.dump import plugin_digest
from kvpolicy.spec.policy import PolicySpec

VERSION = "1"
_FILES = TensorFiles("calibration", "calibrate again", CalibrationError)
_LONGEST_NUMBER = 4  # digits: no model has ten thousand layers


@attrs.frozen(eq=False)
class Calibration:
    """Tensors for each managed layer, and what they were measured for."""

    layers: tuple[Mapping[str, Tensor], ...]
    store: str  # digest of the codec and its parameters
    model: str  # digest of the model

    def save(self, path: "str | os.PathLike[str]") -> None:
        """Write a safetensors file. Raises CalibrationError when that cannot be done."""
        about = {"kvpolicy": VERSION, "store": self.store, "model": self.model, "layers": str(len(self.layers))}
        _FILES.write(path, self._tensors, about)

    @property
    def digest(self) -> str:
        """16 hex digits of all that was measured: entries packed with one calibration are not read with another."""
        return digest_of({name: tensor.detach().cpu() for name, tensor in self._tensors.items()}, {})[:16]

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return {f"layers.{n}.{name}": t for n, one in enumerate(self.layers) for name, t in one.items()}

    @classmethod
    def read(cls, path: "str | os.PathLike[str]") -> "Calibration":
        """Raises CalibrationError when there is no such file, when it is not a calibration, or when it is damaged."""
        tensors, about = _FILES.read(path)
        name = os.fsdecode(path)
        layers = _parsed(name, about, tensors)
        _FILES.require_whole(name, tensors, about)
        # Copies: what has been read is the file itself, which others may change.
        held = tuple({key: tensor.clone() for key, tensor in one.items()} for one in layers)
        return cls(held, about["store"], about["model"])

    def require(self, spec: PolicySpec, model: str | None, origin: str = "calibration") -> None:
        """Raise CalibrationError unless it was made for this policy's store and the model of this digest, if known."""
        if self.store != plugin_digest(spec.store):
            raise CalibrationError(
                f"{origin}: was made for another store than that of policy {spec.name} ({spec.store.name} with its "
                "parameters): calibrate again"
            )
        if model is not None and self.model != model:
            found = shown(self.model)
            raise CalibrationError(f"{origin}: was made for another model (digest {found}, this one is '{model}')")


def _parsed(name: str, about: Mapping[str, str], tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of each layer."""
    missing = [key for key in ("kvpolicy", "store", "model", "layers") if key not in about]
    if missing or about["kvpolicy"] != VERSION or not _is_number(about["layers"]):
        found = shown(str({key: shown(text) for key, text in about.items()}))
        raise CalibrationError(f"{name}: is not a calibration of kvpolicy (version {VERSION}): {found}")
    layers: list[dict[str, Tensor]] = [{} for _ in range(int(about["layers"]))]
    for key, tensor in tensors.items():
        prefix, _, rest = key.partition(".")
        number, _, own = rest.partition(".")
        if prefix != "layers" or not _is_number(number) or int(number) >= len(layers):
            raise CalibrationError(f"{name}: holds a tensor that does not belong there: {shown(key)}")
        layers[int(number)][own] = tensor
    return layers


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= _LONGEST_NUMBER
