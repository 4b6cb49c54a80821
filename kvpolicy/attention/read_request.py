"""What a reader is told about a decode step."""

import torch
from torch import Tensor

from kvpolicy.cache.query_batch import QueryBatch
from kvpolicy.cache.storage.layer_storage import LayerStorage
from kvpolicy.plan.plan import POSITIONS, Plan
from kvpolicy.stages import Format, Reader, ReadRequest
from kvpolicy.stages.checking.returned import check_tensor
from kvpolicy.stages.checking.untouched import tensors_of_request, watching


def read_request(plan: Plan, storage: LayerStorage, batch: QueryBatch, ordinal: int) -> ReadRequest:
    """One query a row, and views of what is held; columns of heads that differ are padded."""
    keys, page = storage.keys, plan.page_formats[ordinal]
    positions = storage.column(POSITIONS, storage.everything)
    return ReadRequest(
        queries=batch.queries[:, :, -1],
        query_positions=batch.positions[:, -1],
        positions=positions,
        geometry=plan.geometry,
        layer=ordinal,
        format=keys.form,
        packed_lengths=positions.new_tensor(keys.packed_lengths, dtype=torch.int64) if not keys.is_plain else None,
        packed=storage.packed_keys,
        pages=storage.pages,
        newest_page={} if page is None or not plan.spec.read.summarises_newest else _newest(page, storage, positions),
        scaling=batch.scaling,
    )


def _newest(page: Format, storage: LayerStorage, positions: Tensor) -> dict[str, Tensor]:
    """The summary of the page of each head's newest entry."""
    newest = (positions >= 0).sum(-1, keepdim=True).clamp(min=1) - 1
    places = torch.arange(page.group_size, device=positions.device)
    slots = (newest // page.group_size * page.group_size + places).minimum(newest)
    return page.encode(storage.keys.pick(storage.everything, slots, positions), positions.gather(2, slots))


def chosen_by(reader: Reader, request: ReadRequest) -> Tensor | None:
    """The slots [B, K, n] that the reader picks; None = all. Raises PluginContractError for anything else."""
    with watching(reader, lambda: tensors_of_request(request)):
        chosen: object = reader.choose(request)
    if chosen is None:
        return None
    width = chosen.shape[-1] if isinstance(chosen, Tensor) and chosen.ndim else 0
    rows, heads = request.positions.shape[:2]
    sizes = {"batch": rows, "kv_heads": heads, "chosen": width}
    return check_tensor(reader, chosen, sizes, torch.int64, request.positions.device)
