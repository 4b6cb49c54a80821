"""G-KV: rounds with a memory, and rows with left pads.

The published code keeps pads in its tensors; here a row is packed to the front: column c of a file
is the position c - pads of the row.
"""

import attrs
import torch

from kvpolicy.stages.slots import gather, indices_of
from kvpolicy_plugins.allocators.uniform_heads import UniformHeads
from kvpolicy_plugins.scorers.attention_based.attention import Attention
from kvpolicy_plugins.scorers.attention_free.redundancy import Redundancy
from kvpolicy_plugins.scorers.history import History
from kvpolicy_plugins.scorers.shared.pooling import Pool
from kvpolicy_plugins.selectors.topk import TopK
from tests.golden.families import close, same
from tests.support.allocating import counts_of
from tests.support.selecting import selected_by
from tests.support.views import fresh_state, view_of

EMPTY_ROW = {"raw": "slot0", "triton": "none"}  # which of the two published codes


def pads_of(mask):
    """Left pads [B] of an attention mask [B, T]."""
    return mask.shape[1] - mask.sum(-1)


def check_similarity(v):
    keys, pads = v["k"], pads_of(v["attention_mask"])
    view = packed_view(keys, torch.arange(keys.shape[2]).expand(keys.shape[:3]), pads)
    scores = Redundancy(v.parameter("threshold"), empty_row="none").score(view)
    close(unpacked(view, scores, pads, keys.shape[2]), v["redundancy"], atol=1e-8, rtol=0)


def packed_view(all_keys, columns, pads, **rest):
    """The entries in `columns` [B, K, T] of the file (-1 = none), without pads."""
    held = indices_of(columns >= pads[:, None, None])
    columns = columns.gather(-1, held.clamp(min=0)).masked_fill(held < 0, -1)
    positions = (columns - pads[:, None, None]).masked_fill(columns < 0, -1)
    return view_of(gather(all_keys, columns), positions=positions, **rest)


def unpacked(view, values, pads, columns):
    """Values [B, K, T] of the entries of `view`, by column of the file; 0 where there is none."""
    where = (view.positions + pads[:, None, None]).clamp(min=0)
    spread = torch.zeros(*values.shape[:2], columns)
    return spread.scatter_add(-1, where, values.masked_fill(~view.valid, 0.0))


def scorer_of(v, queries):
    """The attention term, with its memory if the file has one."""
    shift = v.parameter("gamma") * v.parameter("shift")
    inner = Attention(queries, group="max", group_at="probabilities", deviation=shift)
    pool = Pool("max" if v.parameter("pool") else "none", v.parameter("kernel"))
    normalise = "max" if v.parameter("normalise") and v.like("score_cache_r*") else "none"
    return History(inner, v.parameter("smooth"), v.parameter("alpha"), normalise, pool)


def select_scores(v, view, attention):
    """What the published code ranks by."""
    kind, part, threshold = v.parameter("redundancy"), v.parameter("lambda"), v.parameter("threshold")
    if kind == "none":
        return attention
    redundancy = Redundancy(threshold, empty_row=EMPTY_ROW[kind]).score(view)
    if v.parameter("normalise") and v.like("score_cache_r*"):
        largest = redundancy.masked_fill(~view.candidates, 0.0).amax(-1, keepdim=True)
        redundancy = redundancy / largest
    return part * attention - (1 - part) * redundancy


def check_rounds(v):
    keys, mask = v["k_all"], v["attention_mask"]
    pads, budget, step, length = pads_of(mask), *(v.parameter(p) for p in ("budget", "step", "first_len"))
    columns = torch.arange(length).expand(*keys.shape[:2], length)
    memory = torch.zeros(*keys.shape[:3])
    for turn in range(v.parameter("rounds")):
        queries = v["q_rounds"][turn]
        scorer = scorer_of(v, queries.shape[2])
        view = packed_view(keys, columns, pads, queries=queries, recent=v.parameter("window"))
        state = fresh_state(scorer, view) if turn == 0 else {"history": remembered(view, memory, pads)}
        view = attrs.evolve(view, slot_state=state)
        view = attrs.evolve(view, slot_state=scorer.observe(view))
        scores = select_scores(v, view, scorer.score(view))
        compare_scores(v[f"select_score_r{turn}"], view, scores, columns, pads)
        kept = best(view, scores, budget)
        expected = v[f"kept_positions_r{turn}"]
        compare_kept(view, kept, expected, pads)
        memory = spread_memory(view, kept, pads, keys.shape[2])
        if f"score_cache_r{turn}" in v:
            compare_memory(v[f"score_cache_r{turn}"], expected, memory, pads)
        new = torch.arange(length, length + step).expand(*keys.shape[:2], step)
        columns, length = torch.cat([expected, new], -1), length + step


def remembered(view, memory, pads):
    """`memory`, laid out by column of the file, for the slots of `view`."""
    return memory.gather(-1, (view.positions + pads[:, None, None]).clamp(min=0))


def spread_memory(view, kept, pads, columns):
    """What is remembered of the kept entries, by column; -inf for entries without a history."""
    where = (view.positions + pads[:, None, None]).gather(-1, kept.clamp(min=0))
    values = view.slot_state["history"].gather(-1, kept.clamp(min=0))
    spread = torch.full((*kept.shape[:2], columns + 1), -torch.inf)
    return spread.scatter(-1, where.masked_fill(kept < 0, columns), values)[..., :columns]


def best(view, scores, budget):
    """Keep indices; a row without enough entries keeps all it has."""
    free = (budget * scores.shape[1] - view.protected.sum((1, 2))).clamp(min=0)
    counts = counts_of(UniformHeads(), scores, view.candidates, free)
    return indices_of(selected_by(TopK(), scores, view.candidates, counts) | view.protected)


def compare_scores(expected, view, scores, columns, pads):
    candidates = columns[..., : expected.shape[-1]]
    found = unpacked(view, scores, pads, int(columns.max()) + 1).gather(-1, candidates)
    real = candidates >= pads[:, None, None]
    close(found[real], expected[real])


def compare_kept(view, kept, expected, pads):
    for row, pad in enumerate(pads.tolist()):
        for head in range(kept.shape[1]):
            slots = kept[row, head][kept[row, head] >= 0]
            columns = view.positions[row, head, slots] + pad
            wanted = expected[row, head]
            same(columns, wanted[wanted >= pad])


def compare_memory(expected, kept_columns, memory, pads):
    columns = kept_columns[..., : expected.shape[-1]]
    real = columns >= pads[:, None, None]
    close(memory.gather(-1, columns)[real], expected[real])
