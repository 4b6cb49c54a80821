"""Small kernels that are known to pass or fail a gate; as a script, compiles those named NAME SM and prints them."""

import json
import sys

import attrs
import triton
import triton.language as tl

from kvpolicy_kernels.common.compile_spec import CompileSpec
from tests.compiled_kernels import BuildError, compile_build, faults_of


@triton.jit
def copy_rows(SOURCE, TARGET, N, D: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    place = n[:, None] * D + tl.arange(0, D)[None, :]
    rows = tl.load(SOURCE + place, mask=(n < N)[:, None], other=0.0)
    tl.store(TARGET + place, rows, mask=(n < N)[:, None])


@triton.jit
def product(A, B, C, K, D: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr):
    m, k = tl.arange(0, BLOCK), tl.arange(0, STEP)
    total = tl.zeros((BLOCK, BLOCK), tl.float32)
    for start in range(0, K, STEP):
        a = tl.load(A + m[:, None] * D + (start + k)[None, :])
        b = tl.load(B + (start + k)[:, None] * D + m[None, :])
        total = tl.dot(a, b, total)
    tl.store(C + m[:, None] * D + m[None, :], total)


@triton.jit
def interpreter_only(TARGET, N: tl.constexpr):
    for step in tl.static_range(N):
        shift: tl.constexpr = 8 * step
        tl.store(TARGET + step, shift)


_COPY = CompileSpec(
    "copy",
    copy_rows,
    {"SOURCE": "*bf16", "TARGET": "*bf16", "N": "i32"},
    {"D": 128, "BLOCK": 64},
    aligned=("SOURCE", "TARGET"),
)
_PRODUCT = CompileSpec(
    "product",
    product,
    {"A": "*bf16", "B": "*bf16", "C": "*fp32", "K": "i32"},
    {"D": 1024, "BLOCK": 128, "STEP": 64},
    aligned=("A", "B", "C", "K"),
    tensor_cores=True,
)
SAMPLES = {
    "copy": _COPY,
    "unaligned": attrs.evolve(_COPY, name="unaligned", aligned=()),
    "no product": attrs.evolve(_COPY, name="no product", tensor_cores=True),
    "product": _PRODUCT,
    "spilt": attrs.evolve(_PRODUCT, name="spilt", warps=1),
    "deep": attrs.evolve(_PRODUCT, name="deep", stages=9),
    "refused": CompileSpec("refused", interpreter_only, {"TARGET": "*i32"}, {"N": 2}),
    "misnamed": attrs.evolve(_COPY, name="misnamed", constants={"D": 128, "BLOCKS": 64}),
    "incomplete": attrs.evolve(_COPY, name="incomplete", constants={"D": 128}),
}


def examined(name, capability):
    """Numbers and faults of a sample, or why it does not compile."""
    try:
        found = compile_build(SAMPLES[name], capability)
    except BuildError as error:
        return {"error": str(error)}
    return {**attrs.asdict(found), "faults": faults_of(SAMPLES[name], found)}


if __name__ == "__main__":
    words = (sample.rsplit(" ", 1) for sample in sys.argv[1:])
    json.dump({f"{name} {sm}": examined(name, int(sm)) for name, sm in words}, sys.stdout)
