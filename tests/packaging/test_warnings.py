"""Which warnings fail a test: ours and those that we cause, not what compilers and drivers say of a machine."""

import warnings

import pytest


def warn(module, category=RuntimeWarning):
    """A warning as if a line of `module` gave it."""
    warnings.warn_explicit("Guards may run slower on this Python", category, f"{module}.py", 1, module=module)


@pytest.mark.parametrize(
    "module",
    ["torch._dynamo.guards", "torch._inductor.utils", "torch.cuda", "torch.backends.cudnn", "triton.runtime.build"],
)
def test_what_compilers_and_drivers_say_of_the_machine_fails_nothing(module):
    with warnings.catch_warnings(record=True) as told:
        warn(module)

    assert [str(one.message) for one in told] == ["Guards may run slower on this Python"]


@pytest.mark.parametrize(
    "module", ["kvpolicy.policy", "kvpolicy_kernels.score.score", "tests.support.models", "torch.nn", "tritonlike"]
)
@pytest.mark.parametrize("category", [RuntimeWarning, DeprecationWarning, UserWarning])
def test_all_other_warnings_fail(module, category):
    with pytest.raises(category):
        warn(module, category)
