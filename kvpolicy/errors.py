"""One class per way to fail. Every error that kvpolicy raises on purpose derives from `KVPolicyError`."""

import difflib
import functools
import re
from collections.abc import Iterable

import attrs

_LONGEST_SHOWN = 60
_LONGEST_LINE = 300
_UNSEEN = re.compile("[\u0000-\u001f\u007f-\u009f\u2028\u2029\ud800-\udfff]")  # would garble a terminal or end a line


class KVPolicyError(Exception):
    """Base of every error of kvpolicy: catch this to catch them all."""


class ParameterError(KVPolicyError, ValueError):
    """A plugin or a policy was built in Python with a value that breaks a rule."""


@attrs.frozen
class Problem:
    """One thing that is wrong in a policy file."""

    where: str  # "rkv.yaml:7:11: score[0].queries"
    message: str  # "must be an integer from 1 to 4096: 'many'"

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class PolicyError(KVPolicyError):
    """A policy cannot be used as written; carries every problem that was found, not only the first."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = tuple(problems)
        super().__init__("\n".join(str(problem) for problem in problems))


class UnknownPolicyError(KVPolicyError):
    """No file and no installed policy has the name that was asked for."""


class PluginError(KVPolicyError):
    """A distribution that offers plugins is broken, or clashes with another one."""


class PluginContractError(PluginError):
    """A plugin returned something that its contract does not allow (shape, dtype, device, range)."""


class UnsupportedModelError(KVPolicyError):
    """The model, its configuration or its device cannot carry a policy; nothing has been changed."""


class AttachError(KVPolicyError):
    """An attachment was used in the wrong order: attached twice, or used after `detach`."""


class UnsupportedCallError(KVPolicyError):
    """A forward or generate call asks an attached model for something that a compressed cache cannot give."""


class CalibrationError(KVPolicyError):
    """A calibration file is damaged, or was made for another policy or another model."""


class CacheError(KVPolicyError):
    """A cache operation that would lose entries, or that found the cache inconsistent."""


class SavedCacheError(KVPolicyError):
    """A file of a saved cache cannot be written or read, is damaged, or is of another policy, model or tokenizer."""


class RegionError(KVPolicyError, ValueError):
    """Regions of a request are no token ranges, overlap, cannot be located, or do not go with the batch or policy."""


class InputError(KVPolicyError):
    """A file or an argument given on the command line cannot be used."""


class EvaluationError(KVPolicyError):
    """An evaluation cannot be run as asked."""


class NonFiniteScoreWarning(UserWarning):
    """NaN or infinity in scores, entries or queries: such scores rank last, such entries are not merged or packed."""


class BudgetWarning(UserWarning):
    """More is held than the budget says, because more is protected."""


class UncompressedWarning(UserWarning):
    """Something goes on as without kvpolicy: correct, but nothing is compressed."""


def shown(value: object) -> str:
    """A value as an error message gives it: in the words of a policy file, and never long."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, (dict, list, tuple)):
        kind = "mapping" if isinstance(value, dict) else "list"
        return f"a {kind}" if value else f"an empty {kind}"
    if type(value) not in (int, float, str):
        return f"a Python {one_line(type(value).__name__, _LONGEST_SHOWN)}"
    if isinstance(value, int) and value.bit_length() > 2 * _LONGEST_SHOWN:
        return f"an integer of {value.bit_length()} bits"  # Python refuses to print very long ones
    text = repr(value[: _LONGEST_SHOWN + 1] if isinstance(value, str) else value)
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…{text[0]}"


def one_line(value: object, longest: int = _LONGEST_LINE) -> str:
    """`str(value)` as one line of at most `longest` characters, whatever class a third party gave us.

    The first line that says anything, without control characters; a placeholder where `str` raises.
    """
    try:
        text = str(value)[: 64 * longest]
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001 - a message is made of it, nothing more
        return f"<{type(value).__name__[:40]}, whose text cannot be had: {type(error).__name__[:40]}>"
    lines = (_UNSEEN.sub(" ", line) for line in text.splitlines())
    line = next((line.strip() for line in lines if line.strip()), "")
    return line if len(line) <= longest else f"{line[: longest - 1]}…"


def described(error: BaseException) -> str:
    """An error of another library or of a plugin as our messages tell of it: its kind and its first line."""
    kind, text = one_line(type(error).__name__, _LONGEST_SHOWN), one_line(error)
    return f"{kind}: {text}" if text else kind


def did_you_mean(name: str, known: Iterable[str], label: str) -> str:
    """`"; did you mean 'topk'? installed: topk"`: the close name, if any, and all of them after `label`."""
    names = tuple(known)
    close = _closest(name, names)
    meant = f"did you mean {close!r}? " if close else ""
    return f"; {meant}{label}: {', '.join(names) or 'none'}"


@functools.lru_cache(maxsize=256)
def _closest(name: str, names: tuple[str, ...]) -> str | None:
    """The name that a misspelt one is closest to, if any is.

    Close names share most of their letters, which is quick to see: a file may have a thousand names to look up.
    """
    letters = set(name)
    likely = [one for one in names if 2 * len(letters & set(one)) >= min(len(letters), len(set(one)))]
    return next(iter(difflib.get_close_matches(name, likely, n=1)), None)
