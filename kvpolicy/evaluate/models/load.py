"""Loads models, configurations and tokenizers by name, path or id."""

from collections.abc import Callable
from importlib.resources import files
from typing import Any, Final, TypeVar

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig
from transformers.utils import logging

from kvpolicy.errors import InputError, KVPolicyError, described, one_line
from kvpolicy.evaluate.fetch.cache_folder import Tell, silent
from kvpolicy.evaluate.models.convert import converted
from kvpolicy.evaluate.models.published import PUBLISHED
from kvpolicy.evaluate.testbed.load import WEIGHTS, load_testbed, model_config

TESTBED: Final = "testbed"
NAMES: Final = (TESTBED, *PUBLISHED)  # they stand before folders of the same name: write ./testbed for such a folder

_T = TypeVar("_T")


def config_of(model: str, tell: Tell = silent) -> PretrainedConfig:
    """The configuration of a model, by name, path or id; no weights are read.

    A published model is fetched first if it is not in the cache folder; `tell` is given a line for each step of that.
    Raises InputError.
    """
    if model == TESTBED:
        return model_config()
    place = place_of(model, tell)
    config: PretrainedConfig = _read(model, "configuration", lambda: AutoConfig.from_pretrained(place))
    return config


def load_model(
    model: str, device: torch.device, dtype: torch.dtype | None = None, tell: Tell = silent
) -> tuple[Any, Any]:
    """A model in evaluation mode and its tokenizer, by name, path or id.

    `dtype` None is the model's own: float32 for `testbed`, bfloat16 for the published ones. A published model is
    fetched as in `config_of`. Raises InputError.
    """
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    loaded: Any
    words: Any
    if model == TESTBED:
        loaded, words = _read(model, "model", lambda: load_testbed(dtype or torch.float32))
    else:
        place = place_of(model, tell)
        words = _read(model, "tokenizer", lambda: AutoTokenizer.from_pretrained(place))
        loaded = _read(model, "model", lambda: AutoModelForCausalLM.from_pretrained(place, dtype=dtype or "auto"))
    return loaded.to(device).eval(), words


def place_of(model: str, tell: Tell = silent) -> str:
    """Where transformers finds a model: its folder, or its id on the hub. A published model is fetched first."""
    if model == TESTBED:
        return str(files("kvpolicy.evaluate.testbed") / WEIGHTS)
    return str(converted(PUBLISHED[model], tell)) if model in PUBLISHED else model


def _read(model: str, what: str, read: Callable[[], _T]) -> _T:
    try:
        return read()
    except KVPolicyError:
        raise
    except Exception as error:  # from_pretrained raises whatever the class of the model does with odd numbers
        reason = one_line(error) if isinstance(error, (OSError, ValueError)) else described(error)
        raise InputError(f"{one_line(model)}: its {what} cannot be read: {reason}") from error
