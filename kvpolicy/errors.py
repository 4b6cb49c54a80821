"""One class per way to fail. Every error that kvpolicy raises on purpose derives from `KVPolicyError`."""

import difflib
import functools
import re
from collections.abc import Iterable

import attrs

_LONGEST_SHOWN = 60
_LONGEST_LINE = 300
# Characters that garble a terminal, end a line or cannot be encoded.
_CONTROL_CHARACTERS = re.compile("[\u0000-\u001f\u007f-\u009f\u2028\u2029\ud800-\udfff]")


class KVPolicyError(Exception):
    """Base of every error of kvpolicy: catch this to catch them all."""


class ParameterError(KVPolicyError, ValueError):
    """A plugin or a policy was built in Python with a value that breaks a rule."""


@attrs.frozen
class Problem:
    """One error in a policy file: where it is and which rule is broken."""

    where: str  # "rkv.yaml:7:11: score[0].queries"
    message: str  # "must be an integer from 1 to 4096: 'many'"

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class PolicyError(KVPolicyError):
    """A policy cannot be used as written. `problems` has all errors of the file, not only the first."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in problems))


class UnknownPolicyError(KVPolicyError):
    """No file and no installed policy has the requested name."""


class PluginError(KVPolicyError):
    """A distribution with plugins cannot be loaded, or its plugin names clash with those of another one."""


class PluginContractError(PluginError):
    """A plugin returned a value that its contract does not allow (shape, dtype, device, range)."""


class UnsupportedModelError(KVPolicyError):
    """The model, its configuration or its device does not support policies; nothing has been changed."""


class AttachError(KVPolicyError):
    """An attachment was used in the wrong order: attached twice, or used after `detach`."""


class UnsupportedCallError(KVPolicyError):
    """A forward or generate call on an attached model uses a feature that a compressed cache does not support."""


class CalibrationError(KVPolicyError):
    """A calibration file is damaged, or was made for another policy or another model."""


class CacheError(KVPolicyError):
    """A cache operation would lose entries, or the cache is inconsistent."""


class SavedCacheError(KVPolicyError):
    """A file of a saved cache cannot be written or read, is damaged, or is of another policy, model or tokenizer."""


class RegionError(KVPolicyError, ValueError):
    """Regions are not token ranges, overlap, cannot be located in the text, or do not match the batch or the policy."""


class InputError(KVPolicyError):
    """A file or an argument given on the command line cannot be used."""


class EvaluationError(KVPolicyError):
    """An evaluation cannot be run with these settings."""


class NonFiniteScoreWarning(UserWarning):
    """NaN or infinity in scores, entries or queries: such scores rank last, such entries are not merged or packed."""


class BudgetWarning(UserWarning):
    """A cache holds more entries than its budget, because more entries are protected."""


class UncompressedWarning(UserWarning):
    """A forward ran without the policy: its result is correct, but nothing was compressed."""


def shown(value: object) -> str:
    """A value as text for an error message, in the syntax of policy files and at most about 60 characters."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (dict, list, tuple)):
        noun = "mapping" if isinstance(value, dict) else "list"
        return f"a {noun}" if value else f"an empty {noun}"
    if type(value) not in (int, float, str):
        return f"a Python {one_line(type(value).__name__, _LONGEST_SHOWN)}"
    if isinstance(value, int) and value.bit_length() > 2 * _LONGEST_SHOWN:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to format very long integers
    text = repr(value[: _LONGEST_SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…{text[0]}"


def one_line(value: object, longest: int = _LONGEST_LINE) -> str:
    """`str(value)` as one line of at most `longest` characters; safe for objects of third parties.

    The result is the first line that is not blank, without control characters; a placeholder if `str` raises.
    """
    try:
        text = str(value)[: 64 * longest]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - only used in a message
        return f"<{type(value).__name__[:40]}, whose text cannot be read: {type(error).__name__[:40]}>"
    lines = (_CONTROL_CHARACTERS.sub(" ", line) for line in text.splitlines())
    line = next((line.strip() for line in lines if line.strip()), "")
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def described(error: BaseException) -> str:
    """An error of another library or of a plugin as text: its class and the first line of its message."""
    class_name, text = one_line(type(error).__name__, _LONGEST_SHOWN), one_line(error)
    return f"{class_name}: {text}" if text else class_name


def did_you_mean(name: str, known: Iterable[str], label: str) -> str:
    """`"; did you mean 'topk'? installed: topk"`: the closest name, if any is close, and `label` with all names."""
    names = tuple(known)
    close = _closest(name, names)
    suggestion = f"did you mean {close!r}? " if close else ""
    return f"; {suggestion}{label}: {', '.join(names) or 'none'}"


@functools.lru_cache(maxsize=256)
def _closest(name: str, names: tuple[str, ...]) -> str | None:
    """The known name that is closest to a misspelt one; None if none is close.

    Names that share few letters are skipped first, because difflib is slow and a file may have a thousand names.
    """
    letters = set(name)
    likely = [known for known in names if 2 * len(letters & set(known)) >= min(len(letters), len(set(known)))]
    return next(iter(difflib.get_close_matches(name, likely, n=1)), None)
