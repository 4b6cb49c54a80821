"""Entries in pages of a pool that all layers and requests share, found through block tables: a serving engine's way."""

from itertools import chain

import torch

from kvpolicy.cache.state_contents import counts_of
from kvpolicy.cache.storage.layer_storage import KVReader, LayerStorage
from kvpolicy.cache.storage.segment_index import SingleSegment
from kvpolicy.errors import CacheError
from kvpolicy.plan.plan import LOG_VOTES, POSITIONS
from kvpolicy.stages.formats import AsIs
from kvpolicy.stages.slots import by_position, gather, indices_of

PAGE = 16  # slots
KEYS, VALUES = "keys", "values"


class PagePool:
    """Tensors [pages, 16, K, ...], one for each column, and the pages that nobody uses."""

    def __init__(self, plan, pages):
        heads, dim = plan.geometry.kv_heads, plan.geometry.head_dim
        shapes = {name: (column.shape, column.dtype) for name, column in plan.columns.items()}
        shapes |= {KEYS: ((dim,), plan.dtype), VALUES: ((dim,), plan.dtype)}
        self.tensors = {
            name: torch.full((pages, PAGE, heads, *shape), 77, dtype=dtype) for name, (shape, dtype) in shapes.items()
        }
        self.free = list(range(pages))
        self.pages = pages

    def storage(self, plan, ordinal, rows, _device):
        """A new storage in this pool: what a cache makes its layers with."""
        return PagedStorage(self, plan, ordinal, rows)

    def __deepcopy__(self, _memo):
        return self

    @property
    def page_bytes(self):
        return sum(tensor[0].nbytes for tensor in self.tensors.values())


class PagedReader(KVReader):
    """Keys or values; nothing is packed."""

    form = AsIs()
    is_plain = True

    def __init__(self, storage, name):
        self.storage, self.name = storage, name

    @property
    def packed_lengths(self):
        return tuple((0,) * self.storage.heads for _ in range(self.storage.rows))

    def read(self, at, start, stop, _positions):
        return self.storage.block(self.name, at)[:, :, start:stop]

    def pick(self, at, slots, _positions):
        return gather(self.storage.block(self.name, at), slots)


class PagedStorage(LayerStorage):
    """Each row has a block table and a length, which all heads share."""

    def __init__(self, pool, plan, ordinal, rows):
        self.pool, self.plan, self.ordinal, self.tables = pool, plan, ordinal, []
        if plan.ragged or plan.packs:
            raise CacheError("pages hold equally many entries of all heads, as they are")
        self.device, self.columns = plan.device, plan.columns
        self.tables, self.row_lengths = [[] for _ in range(rows)], [0] * rows
        self.keys, self.values = PagedReader(self, KEYS), PagedReader(self, VALUES)

    def __del__(self):
        for table in self.tables:
            self.pool.free += table

    rows = property(lambda self: len(self.tables))
    heads = property(lambda self: self.plan.geometry.kv_heads)
    lengths = property(lambda self: tuple((length,) * self.heads for length in self.row_lengths))
    capacities = property(lambda self: tuple((len(table) * PAGE,) * self.heads for table in self.tables))
    longest = property(lambda self: max(self.row_lengths, default=0))
    average = property(lambda self: sum(self.row_lengths) / max(1, self.rows))
    is_even = property(lambda self: len(set(self.row_lengths)) <= 1)
    is_block = True
    nbytes = property(lambda self: sum(map(len, self.tables)) * self.pool.page_bytes)

    def block(self, name, at):
        """[b, k, T, ...], a copy; zeros, or positions of -1, behind the length of a row."""
        rows, heads = ([at.row], [at.head]) if isinstance(at, SingleSegment) else (at.rows, range(self.heads))
        longest = max((self.row_lengths[row] for row in rows), default=0)
        tensor = self.pool.tensors[name]
        found = tensor.new_full((len(rows), longest, *tensor.shape[2:]), -1 if name == POSITIONS else 0)
        for place, row in enumerate(rows):
            length = self.row_lengths[row]
            found[place, :length] = tensor[self.tables[row]].flatten(0, 1)[:length]
        return found.transpose(1, 2)[:, list(heads)]

    def column(self, name, at):
        return self.block(name, at)

    def _write(self, name, row, start, slots):
        """Slots [n, K, ...] from `start` on; there are pages for them."""
        where = torch.arange(start, start + slots.shape[0])
        pages = torch.tensor(self.tables[row], dtype=torch.long)[where // PAGE]
        self.pool.tensors[name][pages, where % PAGE] = slots

    def _resize(self, row, length):
        """Take or give back pages."""
        table, needed = self.tables[row], -(-length // PAGE)
        while len(table) < needed:
            table.append(self.pool.free.pop())
        self.pool.free += table[needed:]
        del table[needed:]
        self.row_lengths[row] = length

    def append(self, keys, values, positions, _limit):
        states = {KEYS: keys, VALUES: values, POSITIONS: positions}
        for row, length in enumerate(list(self.row_lengths)):
            self._resize(row, length + keys.shape[2])
            for name, tensor in self.pool.tensors.items():
                fill = self.columns[name].fill if name not in states else 0
                new = (
                    states[name][row]
                    if name in states
                    else tensor.new_full((), fill).expand(self.heads, keys.shape[2], *tensor.shape[3:])
                )
                self._write(name, row, length, new.transpose(0, 1).to(tensor.dtype))

    def replace_newest_positions(self, positions):
        for row, length in enumerate(self.row_lengths):
            new = positions[row].transpose(0, 1)
            self._write(POSITIONS, row, length - new.shape[0], new)

    def truncate(self, count):
        for row, length in enumerate(list(self.row_lengths)):
            self._resize(row, length - count)

    def sort_by_position(self):
        slots = by_position(self.column(POSITIONS, self.everything))
        for name in self.pool.tensors:
            self.write_column(name, self.everything, gather(self.block(name, self.everything), slots))

    def write_column(self, name, at, values):
        assert not isinstance(at, SingleSegment)
        for place, row in enumerate(at.rows):
            length = min(self.row_lengths[row], values.shape[2])
            self._write(name, row, 0, values[place, :, :length].transpose(0, 1))

    def evict(self, compaction, _limit):
        self._put(compaction, {})

    def replace(self, compaction, entries, fresh, _limit):
        changed = {KEYS: entries.keys, VALUES: entries.values, **fresh}
        if entries.log_votes is not None:
            changed[LOG_VOTES] = entries.log_votes
        self._put(compaction, changed)

    def drop_pads(self, _limit):
        for row in range(self.rows):
            own = self.column(POSITIONS, type(self.everything)([row]))
            self._keep(row, indices_of(own >= 0), {})

    def _put(self, compaction, changed):
        for place, row in enumerate(compaction.rows):
            own = {name: tensor[place : place + 1] for name, tensor in changed.items()}
            self._keep(row, compaction.kept[place : place + 1], own)

    def _keep(self, row, kept, changed):
        """One row keeps slots [1, K, N], as many of each head; `changed` are new contents of the columns."""
        counts = (kept >= 0).sum(-1).unique().tolist()
        assert len(counts) <= 1, "all heads keep equally many"
        length, at = (counts or [0])[0], type(self.everything)([row])
        for name in self.pool.tensors:
            new = changed[name] if name in changed else gather(self.block(name, at), kept)
            self._write(name, row, 0, new[0, :, :length].transpose(0, 1).to(self.pool.tensors[name].dtype))
        self._resize(row, length)

    def selected(self, rows):
        other = PagedStorage(self.pool, self.plan, self.ordinal, len(rows))
        for place, row in enumerate(rows):
            other._resize(place, self.row_lengths[row])
            for name in self.pool.tensors:
                own = self.block(name, type(self.everything)([row]))[0].transpose(0, 1)
                other._write(name, place, 0, own)
        return other

    def describe(self):
        yield "lengths", counts_of(self.row_lengths)
        for name in self.pool.tensors:
            yield name, self.block(name, self.everything).contiguous()

    def restore(self, contents):
        for row, length in enumerate(contents.counts("lengths", (self.rows,))):
            self._resize(row, length)
        for name, tensor in self.pool.tensors.items():
            shape = (self.rows, self.heads, self.longest, *tensor.shape[3:])
            self.write_column(name, self.everything, contents.tensor(name, tensor.dtype, shape))

    def check_integrity(self):
        used = list(chain(*self.tables))
        if len(set(used)) != len(used) or set(used) & set(self.pool.free):
            raise CacheError("a page is used twice, or free and in use")
        if len(set(self.pool.free)) != len(self.pool.free):
            raise CacheError("a page was given back twice")
        if any(-(-length // PAGE) != len(table) for length, table in zip(self.row_lengths, self.tables, strict=True)):
            raise CacheError(f"{self.row_lengths} entries in {[len(table) for table in self.tables]} pages")
