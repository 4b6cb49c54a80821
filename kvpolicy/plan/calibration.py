"""What a policy has measured on a model before it can be used: a safetensors file with digests inside."""

import os
from collections.abc import Mapping
from pathlib import Path

import attrs
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvpolicy.errors import CalibrationError
from kvpolicy.spec.dump import plugin_digest
from kvpolicy.spec.policy import PolicySpec

VERSION = "1"
_LARGEST = 2**34  # bytes; a file beyond that is no calibration


@attrs.frozen(eq=False)
class Calibration:
    """Tensors for each managed layer, and what they were measured for."""

    layers: tuple[Mapping[str, Tensor], ...]
    store: str  # digest of the codec and its parameters
    model: str  # digest of the model

    def save(self, path: "str | os.PathLike[str]") -> None:
        """Write a safetensors file. Raises CalibrationError when that cannot be done."""
        tensors = {f"layers.{n}.{name}": t.contiguous() for n, one in enumerate(self.layers) for name, t in one.items()}
        about = {"kvpolicy": VERSION, "store": self.store, "model": self.model, "layers": str(len(self.layers))}
        try:
            save_file(tensors, os.fspath(path), metadata=about)
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"{os.fspath(path)}: cannot be written: {error}") from error

    @classmethod
    def read(cls, path: "str | os.PathLike[str]") -> "Calibration":
        """Raises CalibrationError when there is no such file, or it is not a calibration."""
        name = os.fspath(path)
        try:
            if Path(name).stat().st_size > _LARGEST:
                raise CalibrationError(f"{name}: is larger than any calibration")
            with safe_open(name, framework="pt") as file:
                about = file.metadata() or {}
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, SafetensorError) as error:
            raise CalibrationError(f"{name}: cannot be read as safetensors: {error}") from error
        return cls(*_parsed(name, about, tensors))

    def require(self, spec: PolicySpec, model: str | None, origin: str = "calibration") -> None:
        """Raise CalibrationError unless it was made for this policy's store and the model of this digest, if known."""
        if self.store != plugin_digest(spec.store):
            raise CalibrationError(
                f"{origin}: was made for another store than that of policy {spec.name} ({spec.store.name} with its "
                "parameters): calibrate again"
            )
        if model is not None and self.model != model:
            raise CalibrationError(f"{origin}: was made for another model (digest {self.model}, this one is {model})")


def _parsed(
    name: str, about: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> tuple[tuple[Mapping[str, Tensor], ...], str, str]:
    wanted = ("kvpolicy", "store", "model", "layers")
    missing = [key for key in wanted if key not in about]
    if missing or about["kvpolicy"] != VERSION or not about["layers"].isdecimal() or len(about["layers"]) > 5:
        raise CalibrationError(f"{name}: is not a calibration of kvpolicy (version {VERSION}): {dict(about)}")
    layers: list[dict[str, Tensor]] = [{} for _ in range(int(about["layers"]))]
    for key, tensor in tensors.items():
        prefix, _, rest = key.partition(".")
        number, _, own = rest.partition(".")
        if prefix != "layers" or not number.isdecimal() or len(number) > 5 or int(number) >= len(layers):
            raise CalibrationError(f"{name}: holds a tensor that does not belong there: {key!r}")
        layers[int(number)][own] = tensor
    return tuple(layers), about["store"], about["model"]
