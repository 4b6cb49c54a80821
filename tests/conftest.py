"""Profiles of the property tests: `ci` is repeatable; `nightly` searches for longer, with fresh randomness.

Without a GPU, kernels run in Triton's interpreter; it must be chosen before Triton is imported.
"""

import importlib.util
import os

import torch
from hypothesis import HealthCheck, settings

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # unset it is a warning, and warnings are errors
if importlib.util.find_spec("triton") and os.environ.get("TRITON_INTERPRET") == "1":
    from tests.support import fast_interpreter

    fast_interpreter.install()


_quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("ci", max_examples=40, derandomize=True, deadline=None, suppress_health_check=_quiet)
settings.register_profile("nightly", max_examples=5000, deadline=None, suppress_health_check=_quiet)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(int(os.environ.get("KVPOLICY_TEST_THREADS", "1")))
