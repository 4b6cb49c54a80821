"""Proof without a GPU: every kernel compiles for every target, keeps to its registers and loads 16 bytes at a time."""

from tests.compiled_kernels.discover import all_builds
from tests.compiled_kernels.gates import faults_of
from tests.compiled_kernels.target import CAPABILITIES, BuildError, Compiled, compile_build

__all__ = ["CAPABILITIES", "BuildError", "Compiled", "all_builds", "compile_build", "faults_of"]
