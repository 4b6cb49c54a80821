"""The scorer of this distribution keeps the contract of its stage."""

import pytest
from example_kvpolicy.key_diversity import KeyDiversity

from kvpolicy.stages.conformance import conformance_cases

CASES = [case for sharpness in (1.0, 2.5) for case in conformance_cases(KeyDiversity(sharpness=sharpness))]


@pytest.mark.parametrize("check", [check for _, check in CASES], ids=[name for name, _ in CASES])
def test_contract(check):
    check()
