"""A changed tile function never runs its old kernel, though Triton's cache knows a function in a tuple by name only."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.building import ROOT
from tests.support.made_once import made_once

pytestmark = pytest.mark.timeout(600)
FUNCTIONS = """
import triton
import triton.language as tl

@triton.jit
def directions(keys):
    return keys * {statistic}

@triton.jit
def favour(keys, values, positions, newest, probabilities, voters, group, attention, statistic, column, length,
           arguments, OPTIONS: tl.constexpr):
    return tl.sum(keys * (statistic[None, :] + {score}), 1)
"""
COMPILE = """
import hashlib, json
from functions_of_a_plugin import directions, favour
from tests.compiled_kernels.target import assemble
from kvpolicy_kernels import Tile
from kvpolicy_kernels.score.score import compile_specs_for
tile = Tile(favour, statistic=directions)
builds = compile_specs_for("favour", [tile], head_dim=64, group=1, window=0)
code = {build.name: assemble(build, 90).asm["ptx"] for build in builds}
print(json.dumps({name: hashlib.sha256(text.encode()).hexdigest() for name, text in code.items()}))
"""


def compiled(folder, score, statistic):
    """Digests of the fused kernels of one tile, made in a process of its own that shares the cache on disk."""
    (folder / "functions_of_a_plugin.py").write_text(
        FUNCTIONS.format(score=score, statistic=statistic), encoding="utf-8"
    )
    clean = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    path = os.pathsep.join((str(folder), str(ROOT)))
    environment = {**clean, "TRITON_CACHE_DIR": str(folder / "cache"), "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("kernel", ["score", "statistics"])
def test_changed_function_is_compiled_anew(versions, kernel):
    before, after = versions

    assert before[f"{kernel} favour"] != after[f"{kernel} favour"]


def test_what_did_not_change_is_the_same(versions):
    before, after = versions

    assert before["statistics join favour"] == after["statistics join favour"]


@pytest.fixture(scope="module")
def versions(tmp_path_factory):
    """The kernels of a plugin, and of the same plugin after both of its functions were changed, in one cache."""

    def make(folder):
        return compiled(folder, score=1.0, statistic=2.0), compiled(folder, score=3.0, statistic=5.0)

    return made_once(tmp_path_factory, "plugin", make)
