"""What the device must tell the host: nothing for a token, one transfer for a compression of all layers."""

import pytest
import torch
from transformers import DynamicCache

from kvpolicy.integrations.transformers.attachment import Attachment
from kvpolicy.integrations.transformers.models.support import geometry_of
from kvpolicy.plan.plan import compile_policy
from tests.support.device_reads import DeviceReads
from tests.support.models import build, prompt
from tests.support.policies import small

EVERY = 4
POLICIES = {
    **{name: small(name, 12, EVERY) for name in ("snapkv", "rkv", "adakv", "h2o", "keepkv", "d2o")},
    "cam": small("snapkv", 12, EVERY, merge="cam"),
    **{name: small(name, 12, EVERY) for name in ("ams", "chunkkv", "criticalkv", "fair", "kvcrush", "vase")},
    "infinipot_v": small(
        *("infinipot_v", 20, EVERY),
        score=[{"use": "frame_value_norm", "rows": 2, "columns": 2, "pool": "1d"}],
        select={"use": "temporal_redundancy", "tokens_per_frame": 4, "recent_frames": 0.3},
    ),
    "threshold": small("adakv", 12, EVERY, allocate={"heads": {"use": "threshold", "value": 0.02}}),
    "whitelist": small("snapkv", 12, EVERY, select={"use": "whitelist"}),
    "regions": small("snapkv", 12, EVERY, protect={"sinks": 1, "recent": 3, "regions": ["system"]}),
    "global": small("snapkv", 12, EVERY, allocate={"joint": "global"}),
    "kivi": small("snapkv", 20, EVERY, store={"use": "kivi", "bits": 4, "group": 4, "residual": 4, "batch": 1}),
    "pages": small("snapkv", 12, EVERY, read={"use": "pages", "page": 4, "budget": 8, "dense_first": 0}),
}
SEVERAL = ("snapkv", "adakv", "global", "kivi")
KINDS = ("token", "compression", "packing")
ON_HOSTS_ONLY = {"_hidden", "_last_kept", "_mass", "_picked", "forgiven_similarity", "hide_faulty", "kept_finite"}


def reads_of(step):
    with DeviceReads().counted() as reads:
        step()
    return reads


def reads(name, layers, *, kernels):
    """Of an ordinary step, of one that compresses all layers, and of one that only packs; beyond the plain model's."""
    one = build(num_hidden_layers=layers)
    plan = compile_policy(POLICIES[name].spec, geometry_of(one.config), "cpu", torch.float32, kernels=kernels)
    token, counts = torch.tensor([[5]]), {kind: {0} for kind in KINDS}
    with torch.no_grad():
        plain = DynamicCache(config=one.config)
        one(prompt(24)[0], past_key_values=plain)
        theirs = reads_of(lambda: one(token, past_key_values=plain)).count
        with Attachment(plan, one) as attachment:
            given = {"system": (2, 5)} if name in ("regions", "fair", "whitelist") else None
            cache = attachment.cache(regions=given)
            attachment.model(prompt(24)[0], past_key_values=cache)
            for _ in range(EVERY + 2):
                before = state_of(cache)
                found = reads_of(lambda: attachment.model(token, past_key_values=cache))
                compressed, packed = (one != other for one, other in zip(before, state_of(cache), strict=True))
                assert {asking for asking, _ in found.on_hosts_only} <= ON_HOSTS_ONLY, found.on_hosts_only
                kind = "compression" if compressed else "packing" if packed else "token"
                counts[kind].add(found.count - theirs)
    return [max(counts[kind]) for kind in KINDS]


def state_of(cache):
    """How often each layer has been compressed, and how many entries of it are packed."""
    packed = [(layer.storage.keys.packed_lengths, layer.storage.values.packed_lengths) for layer in cache.managed]
    return [layer.stats.compressions for layer in cache.managed], packed


@pytest.mark.parametrize(
    ("name", "kernels", "layers"),
    [
        pytest.param(name, kernels, layers, id=f"{name}-{'kernels' if kernels else 'references'}-{layers}")
        for name in POLICIES
        for kernels, layers in ((False, 2), (False, 4), (True, 2), (True, 4))
        if not kernels or layers == 2 or name in SEVERAL  # kernels are interpreted, which is slow
    ],
)
def test_a_token_is_no_read_and_a_compression_of_all_layers_one(name, kernels, layers):
    token, compression, packing = reads(name, layers, kernels=kernels)

    assert (token, compression) == (0, 1)
    assert packing == (name == "kivi")


def test_a_scorer_of_chunks_asks_nothing_for_a_token_once_the_prompt_is_over():
    """Not even beside a row without a token: with `every: never` no queries are waiting then."""
    one, (tokens, mask), found = build(), prompt(24, 20), {}
    for name, score in (("chunks", {"use": "chunk_attention", "chunk": 5}), ("usual", {"use": "recency"})):
        policy = small("snapkv", 12, "never", score=[score])
        with policy.attach(one) as attachment, torch.no_grad():
            cache = attachment.cache()
            one(tokens, attention_mask=mask, past_key_values=cache)
            counts = []
            for has_token in (1, 0):
                mask_now = torch.cat([mask, torch.ones(2, len(counts) + 1, dtype=mask.dtype)], 1)
                mask_now[1, -1] = has_token
                step = {"attention_mask": mask_now, "past_key_values": cache}
                counts.append(reads_of(lambda step=step: one(torch.tensor([[5], [6]]), **step)).count)
            found[name] = counts[-1]
    assert found["chunks"] == found["usual"]


def test_what_waits_for_a_device_is_counted():
    numbers = torch.arange(6.0)
    mask = numbers > 2
    waits = [
        lambda: numbers.sum().item(),
        lambda: bool(mask.any()),
        lambda: [0] * int(numbers.amax()),
        lambda: torch.where(mask),
        lambda: numbers[mask],
        lambda: numbers.masked_select(mask),
        lambda: torch.equal(numbers, numbers),
        lambda: "abcdefg"[numbers.long()[3]],
        lambda: numbers.repeat_interleave(numbers.long()),
    ]
    methods = [(numbers, "tolist"), (numbers, "cpu"), (numbers, "numpy"), (numbers, "unique"), (mask, "nonzero")]
    waits += [lambda tensor=tensor, name=name: getattr(tensor, name)() for tensor, name in methods]
    assert [reads_of(wait).count > 0 for wait in waits] == [True] * len(waits)
    free = [
        lambda: numbers.where(mask, 0),
        lambda: numbers.masked_fill(mask, 0),
        lambda: numbers[numbers.long()],
        lambda: numbers.gather(0, numbers.long()),
    ]
    assert [reads_of(one).count for one in free] == [0] * len(free)
