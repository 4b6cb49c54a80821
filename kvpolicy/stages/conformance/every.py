"""Checks for plugins of all stages."""

import copy
import pickle

import attrs

from kvpolicy.errors import PluginError
from kvpolicy.stages.checking.returned import contract_error
from kvpolicy.stages.conformance.promises import Promises
from kvpolicy.stages.contracts import Plugin
from kvpolicy.stages.registry.admission import admit


def can_be_named_in_a_policy(plugin: Plugin, _promises: Promises) -> None:
    try:
        admit(type(plugin))
    except PluginError as error:
        raise contract_error(plugin, f"cannot be named in a policy: {error}") from error


def is_frozen(plugin: Plugin, _promises: Promises) -> None:
    fields = attrs.fields(type(plugin))  # type: ignore[arg-type]  # `admit` has checked that it is an attrs class
    for name in [*(field.name for field in fields), "anything"]:
        try:
            setattr(plugin, name, None)
        except AttributeError:  # attrs.exceptions.FrozenInstanceError derives from it
            continue
        raise contract_error(plugin, f"lets {name!r} be set, expected an immutable instance")


def equals_its_copies(plugin: Plugin, _promises: Promises) -> None:
    """Policies are sent between processes and used as cache keys."""
    for description, duplicate in (
        ("copy", copy.deepcopy(plugin)),
        ("pickled copy", pickle.loads(pickle.dumps(plugin))),  # noqa: S301
        ("evolved copy", attrs.evolve(plugin)),  # type: ignore[misc]
    ):
        if duplicate != plugin or hash(duplicate) != hash(plugin):
            raise contract_error(plugin, f"does not equal its {description} {duplicate!r}, or has another hash")


def names_what_it_is_calibrated_by(plugin: Plugin, _promises: Promises) -> None:
    parameters = [field.name for field in attrs.fields(type(plugin))]  # type: ignore[arg-type]  # `admit` has checked it
    if unknown := sorted(set(plugin.calibrated_by or ()).difference(parameters)):
        raise contract_error(plugin, f"is calibrated by {unknown}, which are not among its parameters {parameters}")


CHECKS = (can_be_named_in_a_policy, is_frozen, equals_its_copies, names_what_it_is_calibrated_by)
