"""How often the testbed model answers right with its full cache: greedy generation on held-out items."""

from collections.abc import Iterator, Sequence

import torch
from attrs import frozen
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from kvpolicy.evaluate.testbed.tasks import Item, is_correct, make_item


@frozen
class Accuracy:
    """Right answers of one task: the last word right, and (stricter) every word of the target right."""

    task: str
    length: int
    items: int
    answers: int
    targets: int

    @property
    def rate(self) -> float:
        """Return the share of right answers."""
        return self.answers / self.items


def measure(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    task: str,
    *,
    seed: int,
    items: int,
    length: int = 1024,
    rows: int = 32,
) -> Accuracy:
    """Generate greedily for ``items`` items of ``task``, ``rows`` at a time, and count what is right."""
    asked = [make_item(task, seed, index, length) for index in range(items)]
    texts = [text for chunk in _chunks(asked, rows) for text in write(model, tokenizer, chunk)]
    answers = sum(is_correct(item, text) for item, text in zip(asked, texts, strict=True))
    targets = sum(item.target == text for item, text in zip(asked, texts, strict=True))
    return Accuracy(task, length, items, answers, targets)


@torch.inference_mode()
def write(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, items: Sequence[Item]) -> list[str]:
    """Return what the model writes after each prompt, greedily, up to ``<eos>``."""
    inputs = tokenizer([item.prompt for item in items], padding=True, return_tensors="pt").to(model.device)
    limit = max(item.new_tokens for item in items)
    written = model.generate(**inputs, max_new_tokens=limit, do_sample=False)  # type: ignore[misc]
    texts: list[str] = tokenizer.batch_decode(written[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return texts


def _chunks(items: Sequence[Item], size: int) -> Iterator[Sequence[Item]]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
