"""What holds for the built-in scorers whatever they are given."""

import attrs
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch.testing import assert_close

from kvpolicy.stages.conformance.samples import shuffled
from kvpolicy_plugins.scorers.attention_based.accumulated_attention import AccumulatedAttention
from kvpolicy_plugins.scorers.attention_based.attention import Attention
from kvpolicy_plugins.scorers.attention_free.cur import Cur
from kvpolicy_plugins.scorers.attention_free.key_norm import KeyNorm
from kvpolicy_plugins.scorers.attention_free.keydiff import KeyDiff
from kvpolicy_plugins.scorers.attention_free.lagkv import LagKV
from kvpolicy_plugins.scorers.attention_free.redundancy import Redundancy
from kvpolicy_plugins.scorers.attention_free.value_norm import ValueNorm
from kvpolicy_plugins.scorers.history import History
from kvpolicy_plugins.scorers.recency import Recency
from kvpolicy_plugins.scorers.shared.pooling import Pool
from tests.property.layers import layers, row_alone
from tests.support import references
from tests.support.views import fresh_state, view_of

GROUPS = ("mean", "max", "sum")
pools = st.builds(Pool, st.sampled_from(("none", "max", "average")), st.sampled_from((1, 3, 7)))
attentions = st.builds(
    Attention,
    queries=st.integers(1, 9),
    softmax=st.sampled_from(("all", "candidates")),
    group=st.sampled_from(GROUPS),
    group_at=st.sampled_from(("logits", "probabilities", "scores", "pooled")),
    reduce=st.sampled_from(("mean", "sum")),
    pool=pools,
    deviation=st.sampled_from((0.0, 2.0)),
    spread=st.sampled_from(("deviation", "variance")),
    causal=st.booleans(),
)
redundancies = st.builds(
    Redundancy,
    st.sampled_from((0.3, 0.5)),
    st.integers(0, 3),
    st.sampled_from(("last", "first")),
    st.sampled_from(("slot0", "none")),
)
curs = st.builds(
    Cur,
    st.sampled_from(("key", "value", "average", "product")),
    window=st.sampled_from((0, 3, 16)),
    rank=st.sampled_from((0, 5)),
)
plain = st.one_of(
    attentions,
    redundancies,
    st.builds(AccumulatedAttention, st.sampled_from(GROUPS)),
    st.builds(ValueNorm, st.sampled_from((1, 2, 3.5))),
    curs,
    st.builds(LagKV, st.integers(0, 5), st.integers(2, 9), cross=st.just(value=True)),
    st.sampled_from((KeyNorm(), KeyDiff(), Recency())),
)
scorers = st.one_of(plain, st.builds(History, plain, st.sampled_from(GROUPS[:2]), pool=pools))


def scored(scorer, view):
    """Scores of the candidates, 0 elsewhere."""
    view = attrs.evolve(view, slot_state=fresh_state(scorer, view))
    scores = scorer.score(attrs.evolve(view, slot_state=scorer.observe(view)))
    return scores.masked_fill(~view.candidates, 0.0)


@given(layers(most=40), attentions)
def test_attention_is_what_a_plain_float64_form_gives(view, scorer):
    scores = scorer.score(view)
    for row, head in torch.cartesian_prod(*map(torch.arange, scores.shape[:2])).reshape(-1, 2).tolist():
        found = scores[row, head][view.candidates[row, head]]
        expected = torch.from_numpy(references.attention_scores(view, scorer, row, head)).float()
        assert_close(found, expected, atol=2e-6, rtol=2e-5)


@given(layers(contents=("normal", "clustered", "one hot", "all equal", "zero"), most=40), redundancies)
def test_redundancy_is_what_the_full_matrix_gives(view, scorer):
    scores = scorer.score(view)
    for row, head in torch.cartesian_prod(*map(torch.arange, scores.shape[:2])).reshape(-1, 2).tolist():
        keys = view.keys[row, head][view.valid[row, head]]
        assume(not references.near_threshold(keys, scorer.threshold))
        expected = references.redundancy(keys, scorer.threshold, scorer.forgive, scorer.forgive_end, scorer.empty_row)
        assert_close(scores[row, head][view.valid[row, head]].double(), expected, atol=1e-7, rtol=1e-5)


@given(layers(), scorers)
def test_scores_are_finite_float32_and_repeatable(view, scorer):
    scores = scored(scorer, view)
    assert scores.dtype == torch.float32
    assert scores.isfinite().all()
    assert torch.equal(scores, scored(scorer, view))


@given(layers(), scorers)
def test_a_row_scores_what_it_would_score_alone(view, scorer):
    assume(not (isinstance(scorer, Redundancy) and rounding_decides(view, scorer)))
    together = scored(scorer, view)
    for row in range(len(together)):
        alone = scored(scorer, row_alone(view, row))[0]
        assert_close(alone, together[row, :, : alone.shape[-1]], atol=1e-5, rtol=1e-4)


def rounding_decides(view, scorer):
    return any(references.near_threshold(keys, scorer.threshold) for keys in view.keys.flatten(0, 1))


@given(layers(), scorers, st.sampled_from((7.0, -1e4)))
def test_empty_slots_do_not_matter(view, scorer, junk):
    empty = ~view.valid
    other = attrs.evolve(
        view,
        keys=view.keys.masked_fill(empty[..., None], junk),
        values=view.values.masked_fill(empty[..., None], junk),
        attention=view.attention.masked_fill(empty[:, :, None], junk),
    )
    assert_close(scored(scorer, other), scored(scorer, view), atol=1e-6, rtol=1e-5)


@given(
    layers(), scorers.filter(lambda one: one.in_any_order()) | st.builds(Attention, shared=st.just(True), pool=pools)
)
def test_an_entry_scores_the_same_in_whichever_slot_it_stands(view, scorer):
    other, slots = shuffled(view)
    assert_close(scored(scorer, other), scored(scorer, view).gather(-1, slots), atol=1e-5, rtol=1e-4)


@given(layers(contents=("normal", "clustered")), st.sampled_from(("all", "candidates")))
def test_window_attention_is_a_share_of_the_voters(view, softmax):
    scorer = Attention(queries=9, softmax=softmax, reduce="sum", causal=False)
    total = scored(scorer, view).sum(-1)
    voters = (view.window_positions >= 0).sum(-1, keepdim=True).expand_as(total)
    assert (total <= voters + 1e-4).all()
    if softmax == "candidates":
        some = view.candidates.any(-1)
        assert_close(total[some], voters[some].float(), atol=1e-4, rtol=1e-4)


@given(layers(contents=("normal", "clustered")), attentions, st.floats(-2, 2))
def test_a_shift_of_all_keys_changes_no_window_attention(view, scorer, shift):
    assume(scorer.group_at != "logits")  # the query heads of a group would be shifted apart
    moved = attrs.evolve(view, keys=view.keys + shift)
    assert_close(scored(scorer, moved), scored(scorer, view), atol=1e-4, rtol=1e-3)


@given(layers(contents=("normal", "clustered")), st.sampled_from((KeyNorm(), Attention(5, pool=Pool("max", 3)))))
def test_a_rotation_of_queries_and_keys_changes_nothing(view, scorer):
    random = torch.Generator().manual_seed(view.keys.shape[2])
    turn = torch.linalg.qr(torch.randn(*[view.keys.shape[-1]] * 2, generator=random)).Q
    turned = attrs.evolve(view, keys=view.keys @ turn, queries=view.queries @ turn)
    assert_close(scored(scorer, turned), scored(scorer, view), atol=1e-4, rtol=1e-4)


@given(layers(), st.sampled_from((3, 7)))
def test_max_pooling_never_lowers_a_score(view, size):
    raw, pooled = (scored(Attention(4, pool=Pool(kind, size)), view) for kind in ("none", "max"))
    assert (pooled >= raw).all()


@given(layers())
def test_shared_scores_are_one_for_all_heads_and_sum_to_one(view):
    view = attrs.evolve(view, sinks=0, recent=0, positions=view.positions[:, :1].expand_as(view.positions))
    scores = scored(Attention(queries=1, shared=True), view)
    assert torch.equal(scores, scores[:, :1].expand_as(scores))
    assert_close(scores.sum(-1), torch.ones(scores.shape[:2]), atol=1e-5, rtol=1e-5)


@given(layers(), redundancies, st.floats(0.5, 8))
def test_redundancy_is_a_distribution_that_lengths_of_keys_do_not_change(view, scorer, factor):
    assume(view.keys.norm(dim=-1).amin() > 1e-3)
    assume(not rounding_decides(view, scorer))
    scores = scorer.score(view)
    assert ((scores >= 0) & (scores <= 1)).all()
    assert_close(scores.sum(-1), torch.ones(scores.shape[:2]), atol=1e-5, rtol=1e-5)
    stretch = torch.linspace(1, factor, scores.shape[-1])[:, None]
    stretched = scorer.score(attrs.evolve(view, keys=view.keys * stretch))
    assert_close(stretched, scores, atol=1e-6, rtol=1e-4)


@given(st.integers(3, 300))
def test_redundancy_of_equal_keys_spares_the_newest(slots):
    keys = torch.ones(1, 1, slots, 16)
    sums = torch.full((slots,), slots - 1.0)
    sums[-1], sums[-2] = 0, slots - 2
    scores = Redundancy().score(view_of(keys))[0, 0]
    assert_close(scores, (sums / slots).softmax(-1), atol=1e-6, rtol=1e-4)


@given(layers(contents=("normal",)), st.floats(0, 1))
def test_history_of_the_largest_keeps_its_promises(view, decay):
    scorer = History(Attention(4), decay=decay)
    view = attrs.evolve(view, slot_state=fresh_state(scorer, view))
    first = scorer.observe(view)["history"]
    other = attrs.evolve(view, queries=-view.queries, slot_state={"history": first})
    local = scorer.observe(attrs.evolve(other, slot_state=fresh_state(scorer, view)))["history"]
    second = scorer.observe(other)["history"]
    some = view.candidates.any(-1)
    assert_close(first.amax(-1)[some], torch.ones_like(first.amax(-1)[some]))
    inside = view.candidates
    assert (second[inside] >= torch.maximum(local, decay * first)[inside] - 1e-6).all()
    assert (second[inside] <= 1 + 1e-6).all()
    assert (second[~inside] == -torch.inf).all()


@given(st.integers(1, 6), st.sampled_from(("max", "mean", "sum")))
def test_what_is_never_seen_again_fades_by_the_decay(turns, update):
    scorer = History(ValueNorm(), update, 0.5, "none")
    view = view_of(torch.ones(1, 1, 4, 16))
    state = {**scorer.observe(attrs.evolve(view, slot_state=fresh_state(scorer, view)))}
    start = state["history"]
    for _ in range(turns):
        unseen = attrs.evolve(view, values=torch.zeros_like(view.values), slot_state=state)
        state = scorer.observe(unseen)
    assert_close(state["history"], start * 0.5**turns)


@given(layers(), st.integers(0, 2**40))
def test_recency_orders_by_position_however_long_the_sequence(view, offset):
    far = attrs.evolve(view, positions=(view.positions + offset).where(view.valid, -1))
    scores = Recency().score(far)
    newer = scores.diff(dim=-1)[view.valid[..., 1:]]
    assert (newer == 1).all()
