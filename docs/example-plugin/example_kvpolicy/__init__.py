"""One scorer and one policy, in a distribution of their own."""

from collections.abc import Iterable

from example_kvpolicy.key_diversity import KeyDiversity
from kvpolicy import hookimpl
from kvpolicy.stages import Plugin


@hookimpl
def kvpolicy_stages() -> Iterable[type[Plugin]]:
    """The plugins of this distribution."""
    return [KeyDiversity]


@hookimpl
def kvpolicy_policies() -> Iterable[str]:
    """The packages whose YAML files are policies."""
    return ["example_kvpolicy"]
