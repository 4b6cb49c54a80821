"""Loads and checks policies, from a path or a name."""

import os
from collections.abc import Mapping
from pathlib import Path

from kvpolicy.errors import InputError, UnknownPolicyError, did_you_mean, shown
from kvpolicy.spec.checks import check
from kvpolicy.spec.overrides import override
from kvpolicy.spec.policy import PolicySpec
from kvpolicy.spec.reader import read
from kvpolicy.spec.structure import structure
from kvpolicy.spec.tree import MAX_BYTES, Problems
from kvpolicy.stages.registry.plugins import registry

_SUFFIXES = (".yaml", ".yml")


def read_policy(source: "str | os.PathLike[str]", /, **overrides: object) -> tuple[PolicySpec, str]:
    """The policy in a file, or the installed policy of that name, and its path.

    A path, or text with a separator or a YAML suffix, is that file only. A bare name is NAME.yaml in the
    working directory, else an installed policy. `overrides` replace top-level keys.

    Raises:
        UnknownPolicyError: no such file and no such policy.
        InputError: the file cannot be read.
        PolicyError: the policy cannot be used as written; has all errors.
    """
    path = _resolve(source)
    return _parsed(_bytes(path), str(path), path.stem, overrides, registry().distribution_of(path)), str(path)


def parse_policy(
    data: bytes | str, label: str = "policy", /, *, default_name: str = "policy", **overrides: object
) -> PolicySpec:
    """The policy in the YAML text `data`; messages call the text `label`.

    Raises:
        PolicyError: the policy cannot be used as written; has all errors.
    """
    return _parsed(data, label, default_name, overrides)


def _parsed(
    data: bytes | str, label: str, default_name: str, overrides: Mapping[str, object], distribution: str = ""
) -> PolicySpec:
    problems = Problems()
    root = override(read(data, label, problems).from_distribution(distribution), overrides, problems)
    spec = structure(root, default_name, problems)
    if spec is not None:
        check(spec, root, problems)
    problems.raise_any()
    return spec  # type: ignore[return-value] # None only if there were problems


def _resolve(source: object) -> Path:
    if isinstance(source, os.PathLike):
        try:
            return Path(os.fsdecode(source))
        except TypeError as error:  # `__fspath__` returned another type
            raise InputError(f"a policy must be given as a path or a name: {shown(source)}") from error
    if not isinstance(source, str):
        raise InputError(f"a policy must be given as a path or a name: {shown(source)}")
    separators = [separator for separator in (os.sep, os.altsep, "/") if separator]
    if source.endswith(_SUFFIXES) or any(separator in source for separator in separators):
        return Path(source)
    here = (Path(source + suffix) for suffix in _SUFFIXES)
    return next((path for path in here if _is_file(path)), None) or _installed(source)


def _installed(name: str) -> Path:
    path, policies = registry().policy(name), registry().policies()
    if path is None:
        several = [key for key in policies if key.endswith(f":{name}")]
        close = f"; write {' or '.join(map(repr, several))}" if several else did_you_mean(name, policies, "installed")
        broken = "".join(f"; not loaded: {source}" for source in registry().broken)
        raise UnknownPolicyError(f"unknown policy {shown(name)}{close}{broken}")
    return path


def _bytes(path: Path) -> bytes:
    if not _is_file(path):  # reading a pipe or a device could block for ever
        raise UnknownPolicyError(f"{shown(str(path))}: {'is no regular file' if _exists(path) else 'no such file'}")
    try:
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except (OSError, ValueError):  # the name is too long or has a NUL
        return False
