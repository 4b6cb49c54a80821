"""Calls of the decode kernel: entries as the runtime holds them, perhaps packed, and what should come out."""

import attrs
import torch
from torch import Tensor

from kvpolicy_kernels import Column
from kvpolicy_kernels.attention.decode import decode
from kvpolicy_kernels.attention.kv_input import (
    ExtraOutputs,
    KVInput,
    KVTensorInput,
    PackedColumn,
    PackedInput,
    Unpacking,
)
from kvpolicy_kernels.attention.split_plan import SplitPlan
from kvpolicy_kernels.quantise.unpack import centred, codebook, fp8, per_channel, per_token, per_vector, scaled_fp8
from tests.kernels.accuracy import assert_twice_as_good
from tests.kernels.outputs import Guarded
from tests.kernels.references import decode as reference
from tests.kernels.scenes import DEVICE, Scene, scene

SMALL = SplitPlan(16, 32, 3)  # of segments of up to 96 entries
MIXED = torch.tensor([[[37, 0], [1, 66]]])  # [L, B, K]
ALIKE = torch.tensor([[[37, 37], [0, 0], [66, 66]], [[5, 5], [1, 1], [2, 2]]])
LAYERS = torch.tensor([[[5], [20]], [[33], [2]]])


@attrs.frozen(eq=False)
class Call:
    """A scene, the entries of each segment as vectors, and the arguments of the kernel."""

    found: Scene
    kv: KVInput
    keys: list[Tensor]  # [n, D] a segment
    values: list[Tensor]
    queries: Tensor  # [P, G, D]
    scaling: float
    query_positions: Tensor | None
    slots: Tensor | None


def call(lengths=MIXED, dim=64, dtype=torch.float32, group=4, *, capacity=None, seed=0, votes=False, positions=False,
         listed=0, keys=None, values=None) -> Call:  # fmt: skip
    """Random entries; `keys` and `values` name how a part of them is packed, `listed` slots are chosen per segment."""
    random = torch.Generator().manual_seed(seed)
    extra = {"votes": ((), torch.float32)} if votes else {}
    found = scene(lengths, dim, dtype, capacity=capacity, extra=extra, seed=seed)
    tensors, vectors = {}, {}
    for name, how in (("keys", keys), ("values", values)):
        tensors[name], vectors[name] = plain(found, name) if how is None else packed(found, name, how, random)
    kv = KVInput(
        found.segments,
        **tensors,
        positions=found.columns["positions"] if positions else None,
        votes=found.columns.get("votes"),
    )
    queries = torch.randn(found.segments.count, group, dim, generator=random).to(dtype).to(DEVICE)
    query_positions = torch.randint(0, 40, (found.segments.rows,), generator=random).to(DEVICE) if positions else None
    slots = chosen(found.segments.lengths.tolist(), listed, random) if listed else None
    return Call(found, kv, vectors["keys"], vectors["values"], queries, dim**-0.5, query_positions, slots)


def plain(found: Scene, name: str):
    return KVTensorInput(found.columns[name], found.segments.starts), found.lists(name)


def packed(found: Scene, name: str, how: Unpacking, random: torch.Generator):
    """Some of the entries of every segment as random columns, the rest behind them as they are."""
    share = found.segments.heads if how.joint else 1  # segments whose entries are in the same units
    layers, owners, lengths = found.segments.layers, found.segments.per_layer // share, found.segments.lengths.tolist()
    own_lengths = enumerate(lengths[::share])
    size = how.group_size
    units = [length // size - (place % 3 == 2 and length >= 2 * size) for place, length in own_lengths]
    per_layer = [units[layer * owners :][:owners] for layer in range(layers)]
    starts = torch.cat([torch.tensor(one).cumsum(0) - torch.tensor(one) for one in per_layer]).to(DEVICE)
    stores = [[numbers(column, sum(one) + 2, random) for one in per_layer] for column in how.columns]
    columns = tuple(column_of(one, how.columns[place].width) for place, one in enumerate(stores))
    vectors = []
    for place, tail in enumerate(found.lists(name)):
        owner = place // share
        own = [store[owner // owners][starts[owner] :][: units[owner]] for store in stores]
        oldest = unpacked(how, own, place % share, tail.shape[1], tail.dtype)
        vectors.append(torch.cat([oldest, tail[: lengths[place] - len(oldest)]]))
    counts = torch.tensor(units, dtype=torch.int32, device=DEVICE)
    tensor_input = KVTensorInput(found.columns[name], found.segments.starts, PackedInput(how, starts, counts, columns))
    return tensor_input, vectors


def numbers(column: PackedColumn, count: int, random: torch.Generator) -> Tensor:
    if column.dtype == torch.uint8:
        drawn = torch.randint(0, 256, (count, column.width), generator=random)
        return drawn.masked_fill(drawn % 128 == 127, 3).to(torch.uint8).to(DEVICE)  # NaN in float8
    return (torch.randn(count, column.width, generator=random) / 8).to(column.dtype).to(DEVICE)


def column_of(tensors: list[Tensor], width: int) -> Column:
    addresses = torch.tensor([one.data_ptr() for one in tensors], device=DEVICE)
    return Column(addresses, tensors[0].dtype, width, tuple(tensors))


def unpacked(how: Unpacking, own: list[Tensor], head: int, dim: int, dtype: torch.dtype) -> Tensor:
    if how.function is per_channel:
        return reference.per_channel(own, *how.options, dim, dtype)
    if how.function is per_token:
        return reference.per_token(own, *how.options, dim, dtype)
    if how.function is centred:
        return reference.centred(own, *how.options, head, dim, dtype)
    if how.function is per_vector:
        return reference.per_token(own, *how.options, dim, dim, dtype)
    if how.function is codebook:
        return reference.codebook(own, *how.options, dim=dim, dtype=dtype)
    return reference.fp8(own, dtype) if how.function is fp8 else reference.scaled_fp8(own, dtype)


def channels(bits: int, dim: int, unit: int = 16, stored: torch.dtype = torch.float16) -> Unpacking:
    each = PackedColumn(dim, stored, shared=True)
    codes = PackedColumn(unit * -(-dim * bits // 8), torch.uint8)
    return Unpacking(per_channel, (codes, each, each), unit, (bits, unit))


def tokens(bits: int, dim: int, group: int = 16, stored: torch.dtype = torch.float16) -> Unpacking:
    each = PackedColumn(dim // group, stored)
    return Unpacking(per_token, (PackedColumn(-(-dim * bits // 8), torch.uint8), each, each), options=(bits, group))


def means(bits: int, dim: int, group: int = 16, stored: torch.dtype = torch.float16, heads: int = 2) -> Unpacking:
    each, codes = PackedColumn(heads * dim // group, stored), PackedColumn(heads * -(-dim * bits // 8), torch.uint8)
    columns = PackedColumn(dim, stored), codes, each, each
    return Unpacking(centred, columns, options=(bits, group, heads), joint=True)


def float8(dim: int, *, scaled: bool = True) -> Unpacking:
    codes = PackedColumn(dim, torch.uint8)
    return Unpacking(scaled_fp8, (codes, PackedColumn(1, torch.float16))) if scaled else Unpacking(fp8, (codes,))


def vectors_of(bits: int, dim: int, stored: torch.dtype = torch.float16) -> Unpacking:
    each = PackedColumn(1, stored)
    return Unpacking(per_vector, (PackedColumn(-(-dim * bits // 8), torch.uint8), each, each), options=(bits,))


def levels(bits: int, dim: int, stored: torch.dtype = torch.float16) -> Unpacking:
    """A codebook whose levels are neither symmetric nor equally far apart."""
    numbers = [((place + 1) ** 1.5 - 2 ** (1.5 * (bits - 1)) + 0.3) / 4 for place in range(2**bits)]
    columns = PackedColumn(-(-dim * bits // 8), torch.uint8), PackedColumn(1, stored)
    return Unpacking(codebook, columns, options=(bits, *numbers), in_basis=True)


def chosen(lengths: list[int], count: int, random: torch.Generator) -> Tensor:
    """[P, count] of distinct slots of each segment, ascending, -1 behind."""
    slots = torch.full((len(lengths), count), -1)
    for place, length in enumerate(lengths):
        own = torch.randperm(length, generator=random)[:count].sort().values
        slots[place, : len(own)] = own
    return slots.to(DEVICE)


def visible(one: Call) -> list[Tensor]:
    """Per segment, which of its entries the query sees."""
    masks = []
    for place, keys in enumerate(one.keys):
        mask = torch.ones(len(keys), dtype=torch.bool, device=DEVICE)
        if one.query_positions is not None:
            positions = one.found.lists("positions")[place]
            row = place % one.found.segments.per_layer // one.found.segments.heads
            mask &= (positions >= 0) & (positions <= one.query_positions[row])
        if one.slots is not None:
            mask &= torch.isin(torch.arange(len(keys), device=DEVICE), one.slots[place])
        masks.append(mask)
    return masks


def run(one: Call, plan=None, *, logits=False, mass=False):
    """Output [P, G, Dv], logits [P, G, T] or None, mass per segment or None; each in a guarded tensor."""
    count, group, _ = one.queries.shape
    width = one.found.segments.longest if one.slots is None else one.slots.shape[1]
    out = Guarded((count, group, one.kv.values.column.width), one.queries.dtype, DEVICE)
    shown = Guarded((count, group, width), torch.float32, DEVICE) if logits else None
    received = [
        torch.full((len(one.found.columns["keys"].storages[layer]), group), 0.5, device=DEVICE)
        for layer in range(one.found.segments.layers)
    ]
    outputs = ExtraOutputs(None if shown is None else shown.tensor, column_of(received, group) if mass else None)
    where = {"query_positions": one.query_positions, "slots": one.slots}
    decode(one.queries, one.kv, one.scaling, **where, extra=outputs, out=out.tensor, plan=plan)
    out.check()
    if shown is not None:
        shown.check()
    return out.tensor, None if shown is None else shown.tensor, received if mass else None


def assert_right(one: Call, plan=None, *, logits=False, mass=False) -> None:
    """What the kernel gives is as good as torch in its dtype, of everything that was asked for."""
    out, shown, received = run(one, plan, logits=logits, mass=mass)
    exact, same = [], []
    for place, seen in enumerate(visible(one)):
        votes = one.found.lists("votes")[place] if one.kv.votes is not None else torch.zeros(len(seen), device=DEVICE)
        given = (one.queries[place], one.keys[place], one.values[place], one.scaling, votes, seen)
        exact.append(reference.attention(*given))
        same.append(reference.in_own_dtype(*given))
    assert_twice_as_good(out, torch.stack([o for o, _, _ in same]), torch.stack([o for o, _, _ in exact]))
    for place, ((_, raw, weights), (_, own_raw, own_weights)) in enumerate(zip(exact, same, strict=True)):
        if shown is not None:
            check_logits(one, shown[place], raw, own_raw, place)
        if received is not None:
            check_mass(one, received, weights, own_weights, place)


def check_logits(one: Call, shown: Tensor, exact: Tensor, same: Tensor, place: int) -> None:
    if one.slots is None:
        found, rest = shown[:, : exact.shape[1]], shown[:, exact.shape[1] :]
    else:
        own = one.slots[place]
        found, rest = shown[:, own >= 0], shown[:, own < 0]
        exact, same = exact[:, own[own >= 0]], same[:, own[own >= 0]]
    assert bool((rest == -torch.inf).all())
    if found.numel():
        assert_twice_as_good(found, same, exact)


def check_mass(one: Call, received: list[Tensor], exact: Tensor, same: Tensor, place: int) -> None:
    start = int(one.found.segments.starts[place])
    own = received[place // one.found.segments.per_layer][start : start + len(exact)] - 0.5
    if own.numel():
        assert_twice_as_good(own, same, exact)
