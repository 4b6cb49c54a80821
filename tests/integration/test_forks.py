"""Forked and loaded caches go on bit for bit as the first one would, under every kind of policy."""

import copy

import pytest
import torch

from kvpolicy.errors import CacheError
from tests.support.alone import repeat
from tests.support.decisions import Decisions
from tests.support.models import build, generate, model, prompt
from tests.support.policies import held, small
from tests.support.rounding import close
from tests.support.states import KIVI, PAGES, assert_same_state, everything

POLICIES = {
    "nothing is evicted": lambda: small("snapkv", budget=400),
    "snapkv": lambda: small("snapkv"),
    "adakv": lambda: small("adakv"),
    "h2o": lambda: small("h2o"),
    "gkv": lambda: small("gkv"),
    "d2o": lambda: small("d2o"),
    "keepkv": lambda: small("snapkv", merge={"use": "keepkv", "window": 4}),
    "kivi": lambda: small("snapkv", budget=20, store=KIVI),
    "tada": lambda: small("snapkv", store={"use": "tada", "bits": 4, "residual": 4, "batch": 4}),
    "rotation": lambda: small("rkv", store={"use": "rotation", "bits": 4, "batch": 1}),
    "latent": lambda: small(
        "snapkv", store={"use": "latent", "rank": 0.5, "value_bits": 8, "value_group": 8, "batch": 2}
    ),
    "pages": lambda: small("snapkv", budget=24, read=PAGES),
    "global": lambda: small("snapkv", allocate={"joint": "global"}),
    "everything": everything,
}
LENGTHS = (40, 29)
STEPS, FEW = 20, 10  # with evictions among them


def attached(one, policy, **options):
    calibration = policy.calibrate(one, prompt(64, 64)[0]) if policy.spec.calibrated else None
    return policy.attach(one, calibration=calibration, **options)


def forward(one, tokens, mask, cache):
    """The logits of tokens whose positions are counted as `generate` counts them: without pads."""
    places = (mask.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
    with torch.no_grad():
        return one(tokens, attention_mask=mask, position_ids=places, past_key_values=cache).logits


def prefilled(one, attachment, lengths=LENGTHS):
    """A cache of a padded prompt and some steps, and the mask of all its tokens."""
    tokens, mask = prompt(*lengths)
    cache = attachment.cache()
    forward(one, tokens, mask, cache)
    return go_on(one, cache, mask, 3)[0], cache


def go_on(one, cache, mask, steps=STEPS, rows=slice(None)):
    """A turn with pads, then decode steps: the mask, and what came out."""
    more, more_mask = prompt(6, 4, seed=1)
    mask, out = torch.cat([mask, more_mask[rows]], 1), []
    out.append(forward(one, more[rows], mask, cache))
    for step in range(steps):
        mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        out.append(forward(one, more[rows, step % 4 + 1 :][:, :1], mask, cache))
        out += [held(cache)] if step % 5 == 4 else []
    return mask, out


def assert_equal(first, second):
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other


@pytest.mark.parametrize(
    ("name", "architecture", "dtype"),
    [
        *((name, "llama", torch.float32) for name in POLICIES),
        *((name, "gemma3", torch.bfloat16) for name in list(POLICIES)[::2]),
    ],
)
def test_forked_and_loaded_caches_give_the_same_bits(name, architecture, dtype, tmp_path):
    one = build(architecture, dtype=dtype)
    with attached(one, POLICIES[name]()) as attachment:
        mask, cache = prefilled(one, attachment)
        cache.save(tmp_path / "c")
        loaded, forked = attachment.load_cache(tmp_path / "c"), cache.fork()
        expected = go_on(one, cache, mask)[1]
        assert_equal(go_on(one, loaded, mask)[1], expected)
        assert_equal(go_on(one, forked, mask)[1], expected)
        if name != "nothing is evicted":
            assert max(len(head) for layer in held(cache) for row in layer for head in row) < 40


@pytest.mark.parametrize(("name", "architecture"), [("adakv", "gemma3"), ("everything", "llama"), ("global", "llama")])
def test_rows_of_a_fork_give_what_moved_rows_give(name, architecture, tmp_path):
    one, rows = build(architecture), [1, 0, 1]
    with attached(one, POLICIES[name]()) as attachment:
        mask, cache = prefilled(one, attachment)
        cache.save(tmp_path / "c")
        moved = copy.deepcopy(cache)
        moved.batch_select_indices(torch.tensor(rows))
        expected = go_on(one, moved, mask[rows], FEW, rows)[1]
        for other in (cache.fork(rows), attachment.load_cache(tmp_path / "c", rows)):
            assert_equal(go_on(one, other, mask[rows], FEW, rows)[1], expected)


def test_regions_and_the_first_prompt_belong_to_the_rows(tmp_path):
    """What is protected by its place in the request stays protected in the rows of a fork and of a file."""
    one, rows = build(), [1, 0, 1]
    protect = {"sinks": 1, "recent": 3, "regions": ["system"]}
    with small("snapkv", budget=14, protect=protect).attach(one) as attachment:
        tokens, mask = prompt(*LENGTHS)
        cache = attachment.cache(regions=[{"system": (2, 7)}, {"system": [(10, 12), (20, 22)]}])
        forward(one, tokens, mask, cache)
        cache.save(tmp_path / "c")
        moved, loaded = copy.deepcopy(cache), attachment.load_cache(tmp_path / "c")
        assert_same_state(cache, loaded)
        assert_same_state(cache, cache.fork())
        moved.batch_select_indices(torch.tensor(rows))
        expected = go_on(one, moved, mask[rows], rows=rows)[1]
        for other in (cache.fork(rows), attachment.load_cache(tmp_path / "c", rows)):
            found = go_on(one, other, mask[rows], rows=rows)[1]
            assert_equal(found, expected)
            for layer in held(other):
                assert all(set(range(2, 7)) <= set(slots) for slots in layer[1])
                assert all({10, 11, 20, 21} <= set(slots) for slots in [*layer[0], *layer[2]])
            other.reset()
            forward(one, tokens[rows], mask[rows], other)
            assert all({10, 11, 20, 21} <= set(slots) for layer in held(other) for slots in layer[2])


def test_the_first_prompt_stays_the_first_in_copies(tmp_path):
    """A later turn is no part of it."""
    one = build()
    with small("snapkv", budget=44, protect={"sinks": 1, "recent": 3, "prompt": True}).attach(one) as attachment:
        tokens, mask = prompt(*LENGTHS)
        cache = attachment.cache()
        forward(one, tokens, mask, cache)
        cache.save(tmp_path / "c")
        loaded, forked = attachment.load_cache(tmp_path / "c"), cache.fork([1, 0])
        assert loaded.spans.prompt == [40, 29]
        assert forked.spans.prompt == [29, 40]
        expected = go_on(one, cache, mask)[1]
        assert_equal(go_on(one, loaded, mask)[1], expected)
        assert all(set(slots) >= set(range(29)) for layer in held(loaded) for heads in layer for slots in heads)


@pytest.mark.parametrize("name", [name for name in POLICIES if name != "nothing is evicted"])
def test_a_row_that_is_forked_gives_what_it_gives_alone(name):
    """Row 1 of two, three times: its shapes are others, so up to rounding."""
    one, decisions, rows = model(), Decisions(), [1, 1, 1]
    tokens, mask = prompt(*LENGTHS)
    with attached(one, POLICIES[name]()) as attachment:
        alone, cache = attachment.cache(), attachment.cache()
        with decisions.watched():
            forward(one, tokens[1:, -LENGTHS[1] :], mask[1:, -LENGTHS[1] :], alone)
            expected = go_on(one, alone, mask[1:, -LENGTHS[1] :], FEW, [0])[1]
        with decisions.followed():
            forward(one, tokens, mask, cache)
            found = go_on(one, cache.fork(rows), mask[rows], FEW, [0, 0, 0])[1]
        assert decisions.repeated
        for logits, wanted in zip(found, expected, strict=True):
            if isinstance(logits, torch.Tensor):
                assert close(logits, wanted.expand_as(logits)), (logits - wanted).abs().max()
            else:
                assert logits == [[layer[0]] * 3 for layer in wanted]


def test_a_fork_goes_its_own_way():
    """And neither is the other's storage: each goes on as if it were alone."""
    one = model("gemma3")
    with small("adakv").attach(one) as attachment:
        mask, cache = prefilled(one, attachment)
        expected = go_on(one, copy.deepcopy(cache), mask)[1]
        other = cache.fork([0, 0])
        go_on(one, other, mask[[0, 0]])
        assert_equal(go_on(one, cache, mask)[1], expected)
        other.reset()
        assert cache.rows == 2


def test_a_prefix_serves_generations_of_any_batch(tmp_path):
    """One row of a prefix, four requests of different length: their pads stand between the prefix and the request."""
    one, decisions, lengths = model(), Decisions(), (9, 4, 6, 2)
    prefix = prompt(40)[0]
    requests, mask = prompt(*lengths, seed=1)
    with small("adakv").attach(one) as attachment:
        cache = attachment.cache()
        with torch.no_grad():
            one(prefix, past_key_values=cache)
        cache.save(tmp_path / "prefix")
        whole = torch.cat([prefix.expand(4, -1), requests], 1)
        whole_mask = torch.cat([torch.ones_like(prefix).expand(4, -1), mask], 1)
        batch = attachment.load_cache(tmp_path / "prefix", rows=[0] * 4)
        with decisions.watched():
            answer = generate(one, whole, whole_mask, past_key_values=batch)
        assert batch.get_seq_length() == 40 + 9 + 23
        for row, length in enumerate(lengths):
            own = torch.cat([prefix, requests[row : row + 1, -length:]], 1)
            alone = attachment.load_cache(tmp_path / "prefix")
            with decisions.followed():
                repeat(answer, [row], one, own, past_key_values=alone)
            assert [rows[0] for rows in held(alone)] == [rows[row] for rows in held(batch)]


@pytest.mark.parametrize("way", ["fork", "save"])
def test_a_cache_in_steps_of_fixed_shapes_is_had_back(way, steps, tmp_path):
    one = model()
    with small("snapkv").attach(one, graph=True) as attachment:
        cache = attachment.cache()
        answer = generate(one, prompt(30)[0], count=9, past_key_values=cache)
        assert steps
        if way == "fork":
            other = cache.fork()
        else:
            cache.save(tmp_path / "c")
            other = attachment.load_cache(tmp_path / "c")
        assert held(other) == held(cache)
        assert other.managed[0].num_tokens == cache.managed[0].num_tokens == [38]
        own = {one.data_ptr() for one in cache.managed[0].storage.slots.tensors.values()}
        assert not own & {one.data_ptr() for one in other.managed[0].storage.slots.tensors.values()}
        first, second = (generate(one, answer.sequences, past_key_values=given) for given in (cache, other))
        assert torch.equal(first.sequences, second.sequences)
        assert_equal(first.logits, second.logits)


def test_a_fork_belongs_to_the_attachment_and_is_reported():
    one = model()
    with small("snapkv").attach(one) as attachment:
        mask, cache = prefilled(one, attachment)
        forked = cache.fork([0] * 5)
        assert sum(layer.nbytes for layer in attachment.report().layers) == sum(one.nbytes for one in forked.stats)
        assert forked.stats[0].entry_bytes == forked.managed[0].storage.nbytes > cache.managed[0].storage.nbytes
    with pytest.raises(CacheError, match="detached"):
        go_on(one, forked, mask[[0] * 5], rows=[0] * 5)
    with pytest.raises(CacheError, match="detached"):
        forked.fork()


def test_layers_that_took_no_part_are_missed_in_a_fork_too():
    """A forward that leaves out a layer is refused by the fork as by the first cache."""
    one = model()
    with small("snapkv").attach(one) as attachment:
        forked = prefilled(one, attachment)[1].fork()
        assert forked.integrity._members == frozenset(range(3))


ROWS = {
    "none": [],
    "too many": [2],
    "negative": [-1],
    "a flag": [True],
    "a fraction": [0.5],
    "text": ["0"],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
def test_rows_that_are_not_held_are_refused(rows, tmp_path):
    one = model()
    with small("snapkv").attach(one) as attachment:
        cache = prefilled(one, attachment)[1]
        cache.save(tmp_path / "c")
        with pytest.raises(CacheError, match=r"rows"):
            cache.fork(rows)
        with pytest.raises(CacheError, match=r"rows"):
            attachment.load_cache(tmp_path / "c", rows)


def test_caches_that_are_empty_pending_or_broken_are_refused(tmp_path, monkeypatch):
    one = model("gemma3")
    with small("snapkv").attach(one) as attachment, torch.no_grad():
        empty, pending, broken = attachment.cache(), prefilled(one, attachment)[1], prefilled(one, attachment)[1]
        pending.activate_past_recording()
        pending.fork()
        one(prompt(3, 3)[0], past_key_values=pending)
        monkeypatch.setattr(one.model.layers[2].mlp, "forward", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            one(prompt(3, 3)[0], past_key_values=broken)
        for cache, message in ((empty, "is empty"), (pending, "pending"), (broken, "failed")):
            with pytest.raises(CacheError, match=message):
                cache.fork()
            with pytest.raises(CacheError, match=message):
                cache.save(tmp_path / "c")
        pending.crop(-1)
        pending.fork()
    assert not list(tmp_path.iterdir())
