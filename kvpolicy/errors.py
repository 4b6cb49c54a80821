"""One class per way to fail. Every error that kvpolicy raises on purpose derives from `KVPolicyError`."""

import attrs


class KVPolicyError(Exception):
    """Base of every error of kvpolicy: catch this to catch them all."""


class ParameterError(KVPolicyError, ValueError):
    """A plugin or a policy was built in Python with a value that breaks a rule."""


@attrs.frozen
class Problem:
    """One thing that is wrong in a policy file."""

    where: str  # "rkv.yaml:7:11: score[0].queries"
    message: str  # "must be an integer >= 1: 'many'"

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


class CacheError(KVPolicyError):
    """A cache operation that would lose entries, or that found the cache inconsistent."""


class InputError(KVPolicyError):
    """A file or an argument given on the command line cannot be used."""


class EvaluationError(KVPolicyError):
    """An evaluation cannot be run as asked."""


class NonFiniteScoreWarning(UserWarning):
    """A scorer produced NaN; the entries concerned rank below every other candidate."""
