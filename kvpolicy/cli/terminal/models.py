"""The device and the dtype that are named on the command line."""

import torch

from kvpolicy.errors import InputError, did_you_mean

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def device_of(name: str) -> torch.device:
    """The device of that name. Raises InputError when it is unknown or this machine has none."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"--device must be cpu, cuda or cuda:N: {name!r}") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"--device must be cpu, cuda or cuda:N: {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"--device {name}: this machine has {torch.cuda.device_count()} CUDA devices")
    return device


def dtype_of(name: str | None) -> torch.dtype | None:
    """The dtype of that name, None for the model's own. Raises InputError."""
    if name is not None and name not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}: {name!r}{did_you_mean(name, DTYPES, 'known')}")
    return None if name is None else DTYPES[name]
