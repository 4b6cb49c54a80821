"""Plugins quantise in kernels where these can run, and as torch does elsewhere."""

import pytest
import torch

from kvpolicy_plugins.codecs.shared import affine, affine_kernels
from kvpolicy_plugins.shared.kernel_device import runs_kernels
from tests.kernels.quantise.quantising import DTYPES, vectors_of
from tests.kernels.scenes import DEVICE


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("group", [3, 16])
def test_plugins_use_the_kernels_where_they_can(group, dtype, monkeypatch):
    vectors = vectors_of((4, 48, 48), torch.float32).to(DEVICE, dtype).view(2, 2, 48, 48)
    calls = {
        "quantise_channels": (vectors, group, 4, torch.float16),
        "quantise_tokens": (vectors, group, 4, torch.float16),
    }
    launched = []
    for name in ("quantise_channels", "quantise_tokens", "dequantise_channels", "dequantise_tokens"):
        monkeypatch.setattr(affine_kernels, name, _noting(getattr(affine_kernels, name), name, launched))

    def run():
        found = {name: getattr(affine, name)(*given) for name, given in calls.items()}
        back = affine.dequantise_channels(*found["quantise_channels"], 4, dtype)
        return found, back, affine.dequantise_tokens(*found["quantise_tokens"], 48, 4, dtype)

    monkeypatch.setattr(affine, "runs_kernels", lambda _device: True)
    by_kernels = run()
    able = [] if dtype == torch.float64 else ["quantise_channels", "dequantise_channels"]
    both = [*able, "quantise_tokens", "dequantise_tokens"] if able and group == 16 else able
    assert sorted(launched) == sorted(both)
    monkeypatch.setattr(affine, "runs_kernels", lambda _device: False)
    exact = run()
    for name, parts in by_kernels[0].items():
        for one, other in zip(parts, exact[0][name], strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other) or DEVICE == "cuda"
    for one, other in zip(by_kernels[1:], exact[1:], strict=True):
        assert one.dtype == dtype
        torch.testing.assert_close(one, other)


def _noting(function, name, names):
    def call(*given):
        result = function(*given)
        names.append(name)
        return result

    return call


def test_kernels_run_on_the_current_gpu_only(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    names = ("cpu", "cuda", "cuda:0", "cuda:1")
    assert [runs_kernels(torch.device(name)) for name in names] == [False, True, False, True]
