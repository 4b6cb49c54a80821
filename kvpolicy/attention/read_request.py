"""What a reader is told about a decode step."""

import torch
from torch import Tensor

from kvpolicy.cache.query_batch import Asked
from kvpolicy.cache.storage.layer_storage import Holdings
from kvpolicy.plan.plan import POSITIONS, Plan
from kvpolicy.stages import Question, Reader
from kvpolicy.stages.checks import check_tensor
from kvpolicy.stages.untouched import tensors_of_question, watching


def question_of(plan: Plan, held: Holdings, asked: Asked, ordinal: int) -> Question:
    """One query a row, and views of what is held; columns of heads that differ are padded."""
    rows, keys = held.everything, held.keys
    positions = rows.of(held.slots, POSITIONS)
    return Question(
        queries=asked.queries[:, :, -1],
        query_positions=asked.positions[:, -1],
        positions=positions,
        geometry=plan.geometry,
        layer=ordinal,
        format=keys.form,
        sealed=positions.new_tensor(keys.sealed, dtype=torch.int64) if not keys.is_plain else None,
        packed={name: rows.of(keys.packed, name) for name in keys.form.columns},
        pages={name: rows.of(held.pages.store, name) for name in held.pages.store.columns},
    )


def chosen_by(reader: Reader, question: Question) -> Tensor | None:
    """The slots [B, K, n] that the reader picks; None = all. Raises PluginContractError for anything else."""
    with watching(reader, lambda: tensors_of_question(question)):
        chosen: object = reader.choose(question)
    if chosen is None:
        return None
    width = chosen.shape[-1] if isinstance(chosen, Tensor) and chosen.ndim else 0
    rows, heads = question.positions.shape[:2]
    sizes = {"batch": rows, "kv_heads": heads, "chosen": width}
    return check_tensor(reader, chosen, sizes, torch.int64, question.positions.device)
