"""Loads the model, configuration and tokenizer that are named on the command line."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import logging

from kvpolicy.errors import InputError, KVPolicyError, described, did_you_mean, one_line

TESTBED = "testbed"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

_T = TypeVar("_T")


def config_of(model: str) -> PretrainedConfig:
    """The configuration of a model, by path or id; no weights are read. Raises InputError."""
    if model == TESTBED:
        from kvpolicy.evaluate.testbed.load import model_config

        return model_config()
    config: PretrainedConfig = _read(model, "configuration", lambda: AutoConfig.from_pretrained(model))
    return config


def load_model(model: str, device: torch.device, dtype: torch.dtype | None) -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer, by path or id. Raises InputError."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded: Any
    words: Any
    if model == TESTBED:
        from kvpolicy.evaluate.testbed import load_testbed

        loaded, words = _read(model, "model", lambda: load_testbed(dtype or torch.float32))
    else:
        words = _read(model, "tokenizer", lambda: AutoTokenizer.from_pretrained(model))
        loaded = _read(model, "model", lambda: AutoModelForCausalLM.from_pretrained(model, dtype=dtype or "auto"))
    return loaded.to(device).eval(), words


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


def _read(model: str, what: str, read: Callable[[], _T]) -> _T:
    try:
        return read()
    except KVPolicyError:
        raise
    except Exception as error:  # from_pretrained raises whatever the class of the model does with odd numbers
        reason = one_line(error) if isinstance(error, (OSError, ValueError)) else described(error)
        raise InputError(f"{one_line(model)}: its {what} cannot be read: {reason}") from error
