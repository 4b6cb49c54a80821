"""Where decisions are made: the functions that make them, wrapped, each decision of a row handed to `settle`."""

import attrs
import torch

from kvpolicy.cache.storage.kv_tensor import KVTensor
from kvpolicy.integrations.transformers.decode_graph import evict
from kvpolicy.plan.compress import step
from kvpolicy.plan.compress.merge import merge
from kvpolicy.stages import Entries, Format
from kvpolicy.stages.slots import gather, indices_of
from kvpolicy_plugins.readers.latent_topk import LatentTopK
from kvpolicy_plugins.readers.pages import Pages
from tests.support.compressing import chosen
from tests.support.rounding import ROUNDING, Decision, noisy, noisy_columns

READERS = (LatentTopK, Pages)


def places(settle):
    """Owner, name and wrapped function of each; `settle(kind, decision)` gives the decision that is to stand."""
    merged, packed, anyhow, on_device = merge, KVTensor._packed, step._choose_anyhow, evict._choose

    def views(spec, fusion, batch, tokens, **given):
        results, parts = [], anyhow(spec, fusion, batch, tokens, **given)
        if spec.allocate.joint is not None:
            return _of_all_layers(settle, spec, batch, parts)
        for (shown, budgets), (seen, found) in zip(batch, parts, strict=True):
            whole = [again() for again in shown]  # `seen` may have forgotten the entries
            settled = [
                _choosing(result, _kept(settle, spec, view, budget, _mask(view, result.kept)))
                for view, budget, result in zip(whole, budgets, found, strict=True)
            ]
            results.append((seen, settled))
        return results

    def static(plan, views, due, budgets, tokens):
        kept, groups = on_device(plan, views, due, budgets, tokens)
        layers = zip(kept, views, budgets, due.tolist(), strict=True)
        masks = [_kept(settle, plan.spec, view, budget, _mask(view, own), rows) for own, view, budget, rows in layers]
        return [indices_of(mask, own.shape[-1]) for mask, own in zip(masks, kept, strict=True)], groups

    def merging(spec, view, kept, **given):
        return _merged(settle, spec, view, kept, merged(spec, view, kept, **given))

    def packing(half, vectors, positions, *counts):
        found = packed(half, vectors, positions, *counts)
        return attrs.evolve(found, columns=_packed(settle, half, vectors, positions, found.columns))

    yield from (
        (step, "_choose_anyhow", views),
        (evict, "_choose", static),
        (step, "merge", merging),
        (KVTensor, "_packed", packing),
    )
    for reader in READERS:
        yield reader, "choose", _reading(settle, reader.choose)


# -- which entries stay --------------------------------------------------------------------------------------------


def _kept(settle, spec, view, budget, mask, due=None):
    """The slots that stay, bool [B, K, T], row by row; of rows that are not due, nothing is decided."""
    rows = []
    for row in range(len(mask)):
        if due is not None and not due[row]:
            rows.append(mask[row : row + 1])
            continue
        part, own = row_of(view, row), budget[row : row + 1]
        width = part.positions.shape[2]

        def decide(noise, part=part, own=own):
            other = noisy_view(part, noise)
            return {"kept": _mask(other, chosen(spec, other, own.tolist()).kept)}

        found = Decision(part.positions, _told(part), {"kept": mask[row : row + 1, :, :width]}, decide)
        settled = settle(("kept", part.layer), found).outcome["kept"]
        rows.append(torch.nn.functional.pad(settled, (0, mask.shape[2] - width)))
    return torch.cat(rows)


def _of_all_layers(settle, spec, batch, parts):
    """What `_choose_anyhow` gives for layers that compete, a row's decision being one on all of them."""
    shown = [again() for group, _ in batch for again in group]
    budgets = torch.cat([own for _, own in batch])
    found = [result for _, results in parts for result in results]
    masks = [_mask(view, result.kept) for view, result in zip(shown, found, strict=True)]
    for row in range(budgets.shape[1]):
        views, own = [row_of(view, row) for view in shown], budgets[:, row : row + 1]

        def decide(noise, views=views, own=own):
            others = [noisy_view(view, noise) for view in views]
            results = step.choose(spec, None, others, own)
            return _numbered(_mask(view, result.kept) for view, result in zip(others, results, strict=True))

        widths = [view.positions.shape[2] for view in views]
        outcome = _numbered(mask[row : row + 1, :, :width] for mask, width in zip(masks, widths, strict=True))
        exact = torch.cat([view.positions for view in views], 2)
        told = tuple(number for view in views for number in _told(view))
        settled = settle(("kept", "all layers"), Decision(exact, told, outcome, decide)).outcome
        for n, (mask, width) in enumerate(zip(masks, widths, strict=True)):
            mask[row, :, :width] = settled[f"kept {n}"][0]
    chosen_in_turn = iter([_choosing(result, mask) for result, mask in zip(found, masks, strict=True)])
    return [(seen, [next(chosen_in_turn) for _ in results]) for seen, results in parts]


def _numbered(masks):
    return {f"kept {number}": mask for number, mask in enumerate(masks)}


def _choosing(result, mask):
    """The same with other entries chosen."""
    return attrs.evolve(result, kept=indices_of(mask), lengths=tuple(map(tuple, mask.sum(-1).tolist())))


def _mask(view, kept):
    """Keep indices [B, K, N] as bool [B, K, T]."""
    mask = torch.zeros((*view.positions.shape[:2], view.positions.shape[2] + 1), dtype=torch.bool, device=kept.device)
    mask.scatter_(-1, kept.long().masked_fill(kept < 0, view.positions.shape[2]), value=True)
    return mask[..., :-1]


def row_of(view, row):
    """One row of a view, in tensors of its own length."""
    slots = max(1, int(view.lengths[row].max()))
    given = attrs.asdict(view, recurse=False, filter=lambda field, _: field.init)
    del given["output_projection"]  # of the model, not of rows
    cut = {name: tensor[[row]] for name, tensor in given.items() if isinstance(tensor, torch.Tensor)}
    along = ("keys", "values", "positions", "log_votes", "pinned", "regions")
    cut |= {name: cut[name][:, :, :slots] for name in along if name in cut}
    cut |= {name: cut[name][..., :slots] for name in ("attention",) if name in cut}
    slot_state = {name: state[[row], :, :slots] for name, state in view.slot_state.items()}
    row_state = {name: state[[row]] for name, state in view.row_state.items()}
    return attrs.evolve(view, **cut, slot_state=slot_state, row_state=row_state)


def noisy_view(view, noise):
    """A view whose numbers differ by rounding."""
    names = ("keys", "values", "queries", "attention", "log_votes")
    states = {name: noisy_columns(getattr(view, name), noise) for name in ("slot_state", "row_state")}
    return attrs.evolve(view, **{name: noisy(getattr(view, name), noise) for name in names}, **states)


def _told(view):
    hidden = ~view.valid[..., None]
    return view.keys.masked_fill(hidden, 0), view.values.masked_fill(hidden, 0)


# -- what becomes of those that do not -----------------------------------------------------------------------------


def _merged(settle, spec, view, kept, entries):
    """The entries of the kept slots [B, K, N], row by row."""
    rows = []
    for row in range(len(kept)):
        part = row_of(view, row)
        width = max(1, int((kept[row] >= 0).sum(-1).max()))
        own = kept[row : row + 1, :, :width]

        def decide(noise, part=part, own=own):
            return _numbers(merge(spec, noisy_view(part, noise), own, faults=0, undone=torch.zeros(1)), own)

        mine = _entries_of(entries, row, width)
        exact = torch.cat([part.positions, gather(part.positions[..., None], own)[..., 0]], -1)
        found = Decision(exact, _told(part), _numbers(mine, own), decide, mine)
        rows.append(settle(("merged", part.layer), found).payload)
    return _stacked(rows, kept.shape[2], entries)


def _numbers(entries, kept):
    """All that a merger gave, as one dict of tensors."""
    named = {"keys": entries.keys, "values": entries.values, "log_votes": entries.log_votes}
    named |= {f"slot {name}": state for name, state in entries.slot_state.items()}
    named = {name: tensor for name, tensor in named.items() if tensor is not None}
    empty = {name: (kept < 0).reshape(*kept.shape, *[1] * (tensor.ndim - 3)) for name, tensor in named.items()}
    hidden = {name: tensor.masked_fill(empty[name], 0) for name, tensor in named.items()}
    return hidden | {f"row {name}": state for name, state in entries.row_state.items()}


def _entries_of(entries, row, width):
    def cut(tensor):
        return None if tensor is None else tensor[row : row + 1, :, :width]

    return Entries(
        cut(entries.keys),
        cut(entries.values),
        cut(entries.log_votes),
        cut(entries.changed),
        {name: cut(state) for name, state in entries.slot_state.items()},
        {name: state[row : row + 1] for name, state in entries.row_state.items()},
    )


def _stacked(rows, width, like):
    """Entries of single rows, as those of a batch."""

    def put(parts, whole):
        if whole is None:
            return None
        out = torch.zeros_like(whole)
        for row, part in enumerate(parts):
            out[row : row + 1, :, : min(width, part.shape[2])] = part[:, :, :width]
        return out

    return Entries(
        *(put([getattr(one, name) for one in rows], getattr(like, name)) for name in ("keys", "values")),
        put([one.log_votes for one in rows], like.log_votes),
        put([one.changed for one in rows], like.changed),
        {name: put([one.slot_state[name] for one in rows], whole) for name, whole in like.slot_state.items()},
        {name: torch.cat([one.row_state[name] for one in rows]) for name in like.row_state},
    )


# -- which codes a number gets -------------------------------------------------------------------------------------


@attrs.frozen(eq=False)
class PackedEntries(Decision):
    """The columns, its payload, that the entries of a head got, or of all heads where they are packed together."""

    outcome: dict[str, torch.Tensor] = attrs.field(init=False, factory=dict)
    form: Format = attrs.field(kw_only=True)

    def beside(self, other):
        """Both decisions on as many entries as both are about: which of them were wanted depends on the other rows."""
        count = min(self.exact.shape[2], other.exact.shape[2])
        return self._first(count), other._first(count)

    def _first(self, count):
        numbers = tuple(number[:, :, :count] for number in self.numbers)
        columns = {name: column[:, :, : count // self.form.group_size] for name, column in self.payload.items()}
        return PackedEntries(self.exact[:, :, :count], numbers, payload=columns, form=self.form)

    def same_answer(self, other, rounding=ROUNDING):
        """Whether the columns are the same, or what they stand for agrees up to rounding."""
        if all(torch.equal(column, other.payload[name]) for name, column in self.payload.items()):
            return True
        self.outcome["decoded"] = self.form.decode(self.payload, self.exact)
        other.outcome["decoded"] = self.form.decode(other.payload, other.exact)
        return super().same_answer(other, rounding)

    def under_noise(self, noise):
        """What the same entries would stand for."""
        columns = self.form.encode(noisy(self.numbers[0], noise), self.exact)
        return {"decoded": self.form.decode(columns, self.exact)}


def _packed(settle, half, vectors, positions, columns):
    """The columns of packed units, head by head, or of all heads where they are packed together."""
    form = half.form
    heads = [slice(None)] if form.joint else [slice(head, head + 1) for head in range(vectors.shape[1])]
    for row in range(vectors.shape[0]):
        for place, head in enumerate(heads):
            at = positions[row : row + 1, head]
            units = _leading(at) // form.group_size
            if not units:
                continue
            count = units * form.group_size
            parts = {name: column[row : row + 1, place : place + 1] for name, column in columns.items()}
            mine = {name: column[:, :, :units].clone() for name, column in parts.items()}
            given = vectors[row : row + 1, head, :count].clone()  # the storage that they stand in is written again
            own = form if form.joint else form.of_head(place)
            found = PackedEntries(at[:, :, :count].clone(), (given,), payload=mine, form=own)
            settled = settle(("packed", half.name, int(at[0, 0, 0])), found)
            for name, column in settled.payload.items():
                parts[name][:, :, : column.shape[2]] = column
    return columns


def _leading(positions):
    """How many entries [1, K, n] stand at the front of every head; behind them there are none, or the last repeated."""
    real = positions >= 0
    real[..., 1:] &= positions[..., 1:] > positions[..., :-1]
    return int(real.long().cumprod(-1).sum(-1).min())


# -- what a step reads ---------------------------------------------------------------------------------------------


def _reading(settle, inner):
    def choose_to_read(reader, question):
        slots = inner(reader, question)
        valid, rows = question.positions >= 0, []
        mask = valid if slots is None else _mask(question, slots)
        for row in range(len(valid)):
            width = max(1, int(valid[row].sum(-1).max()))

            def decide(noise, row=row, width=width):
                columns = {name: noisy_columns(getattr(question, name), noise) for name in ("packed", "pages")}
                found = inner(reader, attrs.evolve(question, queries=noisy(question.queries, noise), **columns))
                return {"read": (valid if found is None else _mask(question, found))[row : row + 1, :, :width]}

            part = slice(row, row + 1)
            outcome = {"read": mask[part, :, :width]}
            numbers = (question.queries[part].clone(), *_looked_at(reader, question, part))
            found = Decision(question.positions[part, :, :width].clone(), numbers, outcome, decide)
            settled = settle(("read", question.layer), found).outcome["read"]
            rows.append(torch.nn.functional.pad(settled, (0, valid.shape[2] - width)))
        settled = torch.cat(rows)
        return slots if torch.equal(settled, mask) else indices_of(settled)

    return choose_to_read


def _looked_at(reader, question, row):
    """What a reader judges by, of one row: in a first layer, rows with the same newest token ask alike."""
    length = int((question.positions[row] >= 0).sum(-1).min())
    units = (
        0 if question.packed_lengths is None else int(question.packed_lengths[row].min()) // question.format.group_size
    )
    yield from (column[row, :, :units].clone() for column in question.packed.values())
    yield from (column[row, :, : length // reader.page].clone() for column in question.pages.values())
