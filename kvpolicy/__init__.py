"""Keep the KV cache of Hugging Face transformers models small, by a policy written in YAML.

import kvpolicy

policy = kvpolicy.load("rkv")
with policy.attach(model) as attachment:
model.generate(**inputs)
print(attachment.report())
"""

from kvpolicy.cache.request.regions import Regions
from kvpolicy.errors import KVPolicyError
from kvpolicy.evaluate.fitting.fit import fit
from kvpolicy.integrations.transformers.attachment import Attachment, attached
from kvpolicy.integrations.transformers.cache import PolicyCache
from kvpolicy.policy import Policy, load
from kvpolicy.stages.registry.hooks import hookimpl

__all__ = ["Attachment", "KVPolicyError", "Policy", "PolicyCache", "Regions", "attached", "fit", "hookimpl", "load"]
__version__ = "0.1.0"
