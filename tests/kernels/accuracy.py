"""The rule for results of floating-point kernels: no worse than twice what torch does in the same dtype."""

import torch
from torch import Tensor


def assert_twice_as_good(found: Tensor, same_dtype: Tensor, exact: Tensor, atol: float = 1e-6) -> None:
    """`found` errs against `exact` (float64) at most twice as much as `same_dtype` torch does, plus `atol` relative.

    NaN and infinities must be in the same places.
    """
    found, same_dtype = found.double(), same_dtype.double()
    assert found.shape == exact.shape, f"{tuple(found.shape)} instead of {tuple(exact.shape)}"
    finite = exact.isfinite()
    same = (found == exact) | (found.isnan() & exact.isnan())
    wrong = (~finite & ~same) | (finite & ~found.isfinite())
    assert not wrong.any(), f"NaN or inf in other places: {_first(wrong, found, exact)}"
    error = (found - exact)[finite].abs()
    allowed = 2 * (same_dtype - exact)[finite].abs().nan_to_num(posinf=0).max() if error.numel() else torch.tensor(0.0)
    scale = exact[finite].abs().max() if error.numel() else torch.tensor(1.0)
    limit = allowed + atol * max(float(scale), 1e-30)
    if error.numel() and error.max() > limit:
        far = torch.zeros_like(finite)
        far[finite] = error > limit
        raise AssertionError(f"error {float(error.max()):.3g} above {float(limit):.3g}: {_first(far, found, exact)}")


def _first(wrong: Tensor, found: Tensor, exact: Tensor) -> list[tuple[list[int], float, float]]:
    places = wrong.nonzero()[:5].tolist()
    return [(place, float(found[tuple(place)]), float(exact[tuple(place)])) for place in places]
