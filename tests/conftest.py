"""Profiles of the property tests: `ci` is repeatable; `nightly` searches for longer, with fresh randomness."""

import os

import torch
from hypothesis import HealthCheck, settings

_quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("ci", max_examples=200, derandomize=True, deadline=None, suppress_health_check=_quiet)
settings.register_profile("nightly", max_examples=5000, deadline=None, suppress_health_check=_quiet)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(int(os.environ.get("KVPOLICY_TEST_THREADS", "1")))
