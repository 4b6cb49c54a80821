"""The policies that come with kvpolicy."""

import pytest

from kvpolicy.spec.load import read_policy
from kvpolicy.stages.registry.plugins import registry

NAMES = ("adakv", "blend", "full", "gkv", "h2o", "pyramidkv", "rkv", "snapkv", "streaming_llm", "tova")
BUDGETS = {  # budget, every, sinks, recent
    "adakv": (1024, 128, 0, 32),
    "ams": (1024, 512, 4, "3.125%"),
    "attention_matching": (1024, "never", 0, "6.25%"),
    "attention_matching_omp": (1024, "never", 0, "6.25%"),
    "chunkkv": (1024, 128, 0, 32),
    "compactor": (1024, "never", 8, 4),
    "criticaladakv": (1024, 128, 0, 32),
    "criticalkv": (1024, 128, 0, 32),
    "curkv": (1024, 128, 4, 0),
    "d2o": (1024, 1, 4, "25%"),
    "duoattention": (1024, 128, "6.25%", "25%"),
    "fair": (1024, 128, 0, 32),
    "finch": (1024, "never", 0, 32),
    "full": ("100%", 128, 0, 0),
    "gkv": (2048, 128, 0, 16),
    "h2o": (1024, 1, 0, "50%"),
    "headkv": (1024, 128, 0, 8),
    "infinipot_v": (4608, 128, 15, 0),
    "keepkv": (1024, 1, 4, "50%"),
    "keydiff": (1024, 128, 0, 0),
    "kvcrush": (1024, 32, "3.125%", "12.5%"),
    "lagkv": (1024, 128, 4, 0),
    "leverage": (1024, 128, 8, 4),
    "pyramidkv": (1024, 128, 0, 8),
    "random": (2048, 64, 0, "3.125%"),
    "rkv": (1024, 128, 0, 8),
    "rkv_centred": (1024, 128, 4, "50%"),
    "headkv_centred": (1024, 128, 4, "25%"),
    "headkv_centred5": (1024, 128, 4, "25%"),
    "rocketkv": (1232, "never", 0, 32),
    "rpc": ("25% of generated", 768, 0, 32),
    "snapkv": (1024, 128, 0, 32),
    "surfacelogickv": (1024, 128, 0, 32),
    "streaming_llm": (512, 1, 4, "100%"),
    "tova": (512, 1, 0, 0),
    "vase_dkv": (1024, 64, 4, "6.25%"),
    "vase": (2048, 64, 0, "3.125%"),
}


def test_they_are_all_there():
    assert set(NAMES) <= set(registry().policies())


@pytest.mark.parametrize("name", sorted(registry().policies()))
def test_policy_says_what_it_is(name):
    spec, origin = read_policy(name)
    text = registry().policies()[name].read_text()

    assert origin.endswith(f"{name}.yaml")
    assert spec.name == name
    assert spec.summary
    assert name == "full" or "arXiv:" in spec.reference
    assert text.startswith("kvpolicy: 1\nname: ")
    assert max(len(line) for line in text.splitlines()) <= 120


@pytest.mark.parametrize("name", BUDGETS)
def test_policy_has_the_sizes_of_its_paper(name):
    spec = read_policy(name)[0]

    protected = (
        count if isinstance(count, int) else count.dump() for count in (spec.protect.sinks, spec.protect.recent)
    )
    assert (spec.budget.dump(), spec.compress.every, *protected) == BUDGETS[name]


@pytest.mark.parametrize(
    ("name", "protected"),
    [
        ("h2o", (0, 512)),
        ("keepkv", (4, 512)),
        ("d2o", (4, 256)),
        ("streaming_llm", (4, 508)),
        ("snapkv", (0, 32)),
        ("random", (0, 64)),
        ("ams", (4, 32)),
        ("kvcrush", (32, 128)),
        ("vase_dkv", (4, 64)),
        ("duoattention", (64, 256)),
        ("attention_matching", (0, 64)),
    ],
)
def test_shares_come_to_the_sizes_of_the_published_code(name, protected):
    spec = read_policy(name)[0]

    assert spec.protect.of(spec.budget.tokens) == protected


def test_rkv_scores_as_published():
    attention, redundancy = read_policy("rkv")[0].score

    assert (attention.weight, redundancy.weight) == (0.1, -0.9)
    assert (attention.scorer.softmax, attention.scorer.group, attention.scorer.group_at) == (
        "candidates",
        "max",
        "logits",
    )
    assert (redundancy.scorer.threshold, redundancy.scorer.forgive, redundancy.scorer.empty_row) == (0.5, 1, "slot0")


def test_gkv_remembers_normalised_scores():
    history, redundancy = read_policy("gkv")[0].score

    assert (history.scorer.of.queries, history.scorer.of.group_at) == (16, "probabilities")
    assert (history.scorer.update, history.scorer.decay, history.scorer.scale) == ("max", 0.8, "max")
    assert (history.weight, redundancy.weight, redundancy.normalise) == (0.5, -0.5, "max")
