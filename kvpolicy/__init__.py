"""Keep the KV cache of Hugging Face transformers models small, by a policy written in YAML.

    import kvpolicy

    policy = kvpolicy.load("rkv")
    with policy.attach(model) as attachment:
        model.generate(**inputs)
    print(attachment.report())

Names are imported where they are first used: transformers takes seconds, and `kvpolicy list` has no use for it.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from kvpolicy.cache.request.regions import Regions
    from kvpolicy.errors import KVPolicyError
    from kvpolicy.evaluate.fitting.fit import fit
    from kvpolicy.integrations.transformers.attachment import Attachment, attached
    from kvpolicy.integrations.transformers.cache import PolicyCache
    from kvpolicy.policy import Policy, load
    from kvpolicy.stages.registry.hooks import hookimpl

__all__ = ["Attachment", "KVPolicyError", "Policy", "PolicyCache", "Regions", "attached", "fit", "hookimpl", "load"]
__version__ = "0.1.0"

_MODULES = {
    "Attachment": "integrations.transformers.attachment",
    "KVPolicyError": "errors",
    "Policy": "policy",
    "PolicyCache": "integrations.transformers.cache",
    "Regions": "cache.request.regions",
    "attached": "integrations.transformers.attachment",
    "fit": "evaluate.fitting.fit",
    "hookimpl": "stages.registry.hooks",
    "load": "policy",
}


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
