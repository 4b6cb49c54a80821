"""Profiles of the property tests: `ci` is repeatable; `nightly` searches for longer, with fresh randomness.

Of tests with many cases a part is run: see `tests/support/cases.py`.

Without a GPU, kernels run in Triton's interpreter; it must be chosen before Triton is imported.
"""

import importlib.util
import os

import pytest
import torch
from hypothesis import HealthCheck, settings

from tests.support import cases

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # unset it is a warning, and warnings are errors
if importlib.util.find_spec("triton") and os.environ.get("TRITON_INTERPRET") == "1":
    from tests.support import fast_interpreter

    fast_interpreter.install(check_overflow=cases.ALL)


_quiet = [HealthCheck.too_slow, HealthCheck.data_too_large]
settings.register_profile("ci", max_examples=25, derandomize=True, deadline=None, suppress_health_check=_quiet)
settings.register_profile("nightly", max_examples=5000, deadline=None, suppress_health_check=_quiet)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

torch.set_num_threads(int(os.environ.get("KVPOLICY_TEST_THREADS", "1")))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect most of the cases of large tests that bring no new value of a parameter."""
    left_out = cases.left_out(items, len(config.args))
    config.hook.pytest_deselected(items=list(left_out))
    items[:] = [item for item in items if item not in left_out]
