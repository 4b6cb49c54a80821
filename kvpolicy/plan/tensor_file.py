"""Safetensors files with a digest of their contents; sizes are checked before a file is parsed."""

import contextlib
import hashlib
import json
import os
import secrets
import stat
import struct
from collections.abc import Mapping
from typing import Any

import attrs
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from kvpolicy.errors import KVPolicyError, one_line, shown

CONTENTS = "contents"  # metadata key of the digest
_HEADER_SIZE = struct.Struct("<Q")
_DTYPES = ("F64", "F32", "F16", "BF16", "F8_E4M3", "F8_E5M2", "I64", "I32", "I16", "I8", "U8", "BOOL")


@attrs.frozen
class TensorFiles:
    """A kind of tensor files: its name and size limits, and the class of its errors."""

    kind: str  # "calibration"
    remedy: str  # "calibrate again"
    error: type[KVPolicyError]
    most_tensors: int = 4096
    largest: int = 2**34  # bytes of a file
    largest_header: int = 2**20  # bytes

    def write(self, path: "str | os.PathLike[str]", tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        """Write tensors, the metadata `about` and a digest of both. The file is complete, or not written at all.

        Raises `error` if that fails.
        """
        # Copies, because safetensors refuses tensors that share memory.
        copies = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
        try:
            _write(os.fsdecode(path), copies, {**about, CONTENTS: digest_of(copies, about)})
        except (OSError, TypeError, ValueError, SafetensorError) as error:
            raise self.error(f"{_path_text(path)}: cannot be written: {one_line(error)}") from error

    def read(self, path: "str | os.PathLike[str]") -> tuple[dict[str, Tensor], dict[str, str]]:
        """Tensors of a file in host memory, and its metadata with the digest.

        The digest is not checked here, but by `require_whole`. Raises `error` if there is no such file, if it is not
        in the safetensors format, or if it exceeds a limit.
        """
        name = _path_text(path)
        try:
            self._check_header(name, os.fsdecode(path))
            with safe_open(os.fsdecode(path), framework="pt") as file:
                about = dict(file.metadata() or {})
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
        except (OSError, TypeError, ValueError, SafetensorError) as error:  # ValueError: a NUL in a path
            raise self.error(f"{name}: cannot be read as safetensors: {one_line(error)}") from error
        return tensors, about

    def require_whole(self, name: str, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
        """Raise `error` unless tensors and metadata have the digest in the metadata."""
        metadata = {key: text for key, text in about.items() if key != CONTENTS}
        if CONTENTS not in about:
            raise self.error(f"{name}: has no digest of its contents, as files of earlier versions: {self.remedy}")
        if about[CONTENTS] != digest_of(tensors, metadata):
            raise self.error(f"{name}: is damaged, its contents do not have the digest in it: {self.remedy}")

    def _check_header(self, name: str, path: str) -> None:
        """Raise `error` for a file that is not regular, too large or malformed, before it is parsed."""
        # Non-blocking: opening a pipe or reading a device could block for ever.
        with open(os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0)), "rb") as file:  # noqa: PTH123 - by number
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise self.error(f"{name}: cannot be read as safetensors: is no regular file")
            if status.st_size > self.largest:
                raise self.error(f"{name}: is larger than any {self.kind}")
            start = file.read(_HEADER_SIZE.size)
            if len(start) < _HEADER_SIZE.size:
                raise self.error(f"{name}: cannot be read as safetensors: it has no header")
            (size,) = _HEADER_SIZE.unpack(start)
            if size > self.largest_header:
                raise self.error(
                    f"{name}: cannot be read as safetensors: its header has {size} bytes, those of {self.kind}s have "
                    f"at most {self.largest_header}"
                )
            self._check_entries(name, file.read(size))

    def _check_entries(self, name: str, header: bytes) -> None:
        try:
            entries = json.loads(header)
        except (ValueError, RecursionError) as error:
            raise self.error(f"{name}: cannot be read as safetensors: its header is no JSON") from error
        if not isinstance(entries, dict) or len(entries) > self.most_tensors:
            raise self.error(
                f"{name}: cannot be read as safetensors: its header must be a mapping of at most "
                f"{self.most_tensors} tensors"
            )
        for key, entry in entries.items():
            if key != "__metadata__" and _dtype(entry) not in _DTYPES:
                raise self.error(f"{name}: cannot be read as safetensors: {shown(key)} is no tensor of a known dtype")


def digest_of(tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> str:
    """64 hex digits of the metadata and of names, dtypes, shapes and bytes of all tensors."""
    digest = hashlib.sha256(json.dumps(dict(about), sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _write(path: str, tensors: Mapping[str, Tensor], about: Mapping[str, str]) -> None:
    """Write to a temporary file in the same folder, then rename it."""
    target = os.path.realpath(path)
    partial = os.path.join(os.path.dirname(target), f".{secrets.token_hex(8)}.part")  # noqa: PTH118, PTH120 - paths are text
    try:
        save_file(dict(tensors), partial, metadata=dict(about))
        os.replace(partial, target)  # noqa: PTH105
    finally:
        with contextlib.suppress(OSError):  # already renamed, or never written
            os.unlink(partial)  # noqa: PTH108


def _path_text(path: object) -> str:
    return os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else shown(path)


def _dtype(entry: Any) -> Any:
    return entry.get("dtype") if isinstance(entry, dict) else None
