"""Proof without a GPU: every kernel compiles for every target, keeps to its registers and loads 16 bytes at a time."""

from kvpolicy.bench.compiled.discover import all_builds
from kvpolicy.bench.compiled.gates import faults_of
from kvpolicy.bench.compiled.target import CAPABILITIES, BuildError, Compiled, compile_build

__all__ = ["CAPABILITIES", "BuildError", "Compiled", "all_builds", "compile_build", "faults_of"]
