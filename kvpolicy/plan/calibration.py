"""What plugins of a policy have measured on a model, saved as safetensors files with digests."""

import os
from collections.abc import Mapping

import attrs
from torch import Tensor

from kvpolicy.errors import CalibrationError, shown
from kvpolicy.plan.tensor_file import TensorFiles, digest_of
from kvpolicy.spec.dump import calibrated_digest
from kvpolicy.spec.policy import PolicySpec

VERSION = "2"
_FILES = TensorFiles("calibration", "calibrate again", CalibrationError)
_LONGEST_NUMBER = 4  # digits: no model has ten thousand layers


@attrs.frozen(eq=False)
class Calibration:
    """Calibrated tensors of each managed layer, and digests of the plugins and the model they are for.

    A tensor is named after the key of its plugin in the policy file: `store.basis`.
    """

    layers: tuple[Mapping[str, Tensor], ...]
    plugins: str  # digest of the calibrated plugins and their parameters
    model: str  # digest of the model

    def of(self, key: str) -> list[dict[str, Tensor]]:
        """For each layer, what the plugin with that key has measured, by its own names."""
        start = f"{key}."
        return [
            {name.removeprefix(start): tensor for name, tensor in layer.items() if name.startswith(start)}
            for layer in self.layers
        ]

    def save(self, path: "str | os.PathLike[str]") -> None:
        """Write a safetensors file. Raises CalibrationError if that fails."""
        about = {"kvpolicy": VERSION, "plugins": self.plugins, "model": self.model, "layers": str(len(self.layers))}
        _FILES.write(path, self._tensors, about)

    @property
    def digest(self) -> str:
        """16 hex digits of all tensors: entries packed with one calibration cannot be unpacked with another."""
        return digest_of({name: tensor.detach().cpu() for name, tensor in self._tensors.items()}, {})[:16]

    @property
    def _tensors(self) -> dict[str, Tensor]:
        return {
            f"layers.{index}.{name}": tensor
            for index, layer in enumerate(self.layers)
            for name, tensor in layer.items()
        }

    @classmethod
    def read(cls, path: "str | os.PathLike[str]") -> "Calibration":
        """Read a file. Raises CalibrationError if there is no such file, or it is damaged or not a calibration."""
        tensors, about = _FILES.read(path)
        name = os.fsdecode(path)
        layers = _parsed(name, about, tensors)
        _FILES.require_whole(name, tensors, about)
        # Copies, because the tensors are mapped from the file, which may change.
        copies = tuple({key: tensor.clone() for key, tensor in layer.items()} for layer in layers)
        return cls(copies, about["plugins"], about["model"])

    def require(self, spec: PolicySpec, model: str | None, origin: str = "calibration") -> None:
        """Raise CalibrationError unless it is for the policy's plugins and the model of this digest, if known."""
        if self.plugins != calibrated_digest(spec):
            names = " and ".join(f"{key}: {plugin.name}" for key, plugin in spec.calibrated.items())
            raise CalibrationError(
                f"{origin}: was made for other plugins than those of policy {spec.name} ({names}, with the parameters "
                "given): calibrate again"
            )
        if model is not None and self.model != model:
            digest = shown(self.model)
            raise CalibrationError(f"{origin}: was made for another model (digest {digest}, this one is '{model}')")


def _parsed(name: str, about: Mapping[str, str], tensors: Mapping[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of each layer."""
    missing = [key for key in ("kvpolicy", "plugins", "model", "layers") if key not in about]
    if missing or about["kvpolicy"] != VERSION or not _is_number(about["layers"]):
        metadata = shown(str({key: shown(text) for key, text in about.items()}))
        raise CalibrationError(f"{name}: is not a calibration of kvpolicy (version {VERSION}): {metadata}")
    layers: list[dict[str, Tensor]] = [{} for _ in range(int(about["layers"]))]
    for key, tensor in tensors.items():
        prefix, _, rest = key.partition(".")
        number, _, tensor_name = rest.partition(".")
        if prefix != "layers" or not _is_number(number) or int(number) >= len(layers):
            raise CalibrationError(f"{name}: has a tensor that does not belong there: {shown(key)}")
        layers[int(number)][tensor_name] = tensor
    return layers


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= _LONGEST_NUMBER
