"""Which test reads which file of published results.

A file's family is the longest listed prefix of its name. `KVPOLICY_GOLDEN_DIR` names another folder of such
files, with other seeds, shapes and parameters, and the same names of arrays.
"""

import os
from fnmatch import fnmatch
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

FOLDER = Path(os.environ.get("KVPOLICY_GOLDEN_DIR", Path(__file__).parent / "vectors"))

TESTED = {
    "test_eviction": (
        *("rkv_rounds", "rkv_similarity", "rkv", "decode_snapkv", "snapkv_ties", "snapkv", "tova", "knorm"),
        *("pyramidkv_budgets", "pyramidkv_kept", "spec_pyramidkv", "h2o_decode", "h2o_prefill"),
        *("streamingllm", "finch", "adakv", "spec_adakv", "gkv_similarity", "gkv"),
    ),
    "test_geometric": ("keydiff", "lagkv", "cur", "compactor", "vase_dkv"),
    "test_fits": ("attention_matching_hak", "attention_matching_omp"),
    "test_votes": ("keepkv_released_code", "keepkv", "vote_bias_attention"),
    "test_output_projection": ("criticalkv",),
    "test_mergers": ("merge_kv", "mergers_reference", "tome_merging"),
    "test_latent": ("sals",),
    "test_layer_budgets": ("cake_layers", "cake_adjust"),
    "test_head_budgets": ("headkv_budgets", "head_budgets"),
    "test_calibrated": ("qfilters", "triattention", "expected_attention"),
    "test_kvzip": ("kvzip_scoring", "kvzip_end_to_end_plus", "kvzip_end_to_end"),
    "test_selection": ("random_pp", "random_randkv", "vase_attnv", "fair_eviction", "ams", "kvcrush_anchors"),
    "test_rpc": ("rpc",),
    "test_video": ("infinipotv_stream", "infinipotv"),
    "test_reading": ("rocketkv_budgets", "rocketkv"),
    "test_stores": ("kivi_decode", "kivi", "tada", "rotation_codebook"),
    "test_turboquant": ("turboquant_vllm",),
    "test_vector_quantisation": ("nova_vq",),
}
NOT_YET = ("effivlm_metrics",)
INFORMATIONAL = ("seed", "*gap", "gap_*")  # how far a result is from being ambiguous


def family_of(name: str) -> str | None:
    """The family of a file name without its suffix; None if there is none."""
    families = [family for tested in TESTED.values() for family in tested] + list(NOT_YET)
    return max((family for family in families if name.startswith(family)), key=len, default=None)


def cases(module: str) -> list[Path]:
    """The files that the test module `module` checks."""
    return [path for path in sorted(FOLDER.glob("*.npz")) if family_of(path.stem) in TESTED[module]]


class Vectors:
    """The arrays of one file, as tensors and numbers; remembers which were read."""

    def __init__(self, path: Path) -> None:
        with np.load(path, allow_pickle=False) as arrays:
            self._arrays = {name: arrays[name] for name in arrays.files}
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def __getitem__(self, name: str) -> Tensor:
        self._read.add(name)
        return torch.from_numpy(self._arrays[name])

    def parameter(self, name: str, default=None):
        """The parameter `p_NAME` as a Python value."""
        if default is not None and f"p_{name}" not in self._arrays:
            return default
        self._read.add(f"p_{name}")
        return self._arrays[f"p_{name}"].item()

    def text(self, name: str) -> str:
        """An array that holds one string."""
        self._read.add(name)
        return str(self._arrays[name])

    def like(self, pattern: str) -> list[str]:
        """Names of the arrays that match a shell pattern."""
        return sorted(name for name in self._arrays if fnmatch(name, pattern))

    def unread(self) -> list[str]:
        """Arrays that no test has looked at."""
        rest = self._arrays.keys() - self._read
        return sorted(name for name in rest if not any(fnmatch(name, known) for known in INFORMATIONAL))


def close(found: Tensor, expected: Tensor, atol: float = 1e-6, rtol: float = 1e-4) -> None:
    torch.testing.assert_close(found, expected.to(found.dtype), atol=atol, rtol=rtol)


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.long(), expected.long(), atol=0, rtol=0)
