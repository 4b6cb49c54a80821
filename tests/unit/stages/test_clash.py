"""A plugin with the name of a built-in one breaks no policy that did not ask for it."""

import pytest

import kvpolicy
from kvpolicy.errors import PluginError, PolicyError, UnknownPolicyError
from kvpolicy.spec.load import parse_policy
from kvpolicy.stages.registry.plugins import registry
from tests.support.models import model

BODIES = {
    "score": ("Scorer", "score(self, view)"),
    "allocate.layers": ("LayerAllocator", "allocate(self, request)"),
    "allocate.heads": ("HeadAllocator", "allocate(self, request)"),
    "allocate.joint": ("JointAllocator", "allocate(self, request)"),
    "select": ("Selector", "select(self, request)"),
    "merge": ("Merger", "merge(self, view, kept)"),
    "store": ("Codec", "formats(self, site)"),
    "read": ("Reader", "choose(self, question)"),
}
SHORT = "kvpolicy: 1\nbudget: 64\nscore:\n  - {use: recency}\n"


def lookalikes():
    """A module with a plugin for every built-in name."""
    built_in = [(one.stage, one.name) for one in registry().plugins()]
    classes = [
        f"@attrs.frozen\nclass Fake{place}({BODIES[stage][0]}):\n    name = {name!r}\n"
        f"    def {BODIES[stage][1]}:\n        raise NotImplementedError\n"
        for place, (stage, name) in enumerate(built_in)
    ]
    names = ", ".join(f"Fake{place}" for place in range(len(built_in)))
    return "\n".join([*classes, f"@hookimpl\ndef kvpolicy_stages():\n    return [{names}]\n"])


def test_shipped_policies_and_defaults_mean_the_built_in_plugins(install):
    before = {name: kvpolicy.load(name) for name in registry().policies()}
    install("a-kv", lookalikes())

    assert registry().names("score")[0] == "a-kv:accumulated_attention"
    for name, policy in before.items():
        assert kvpolicy.load(name) == policy
        assert kvpolicy.load(name).digest == policy.digest
    assert parse_policy(kvpolicy.load("rkv").to_yaml()) == before["rkv"].spec  # which names them in full
    short = parse_policy(SHORT.replace("recency", "kvpolicy:recency"))  # all the rest are defaults
    assert type(short.store).__module__.startswith("kvpolicy_plugins.")


def test_name_that_a_file_writes_must_be_clear(install):
    install("a-kv", lookalikes())

    with pytest.raises(PolicyError, match="more than one plugin has the name 'recency'; write 'kvpolicy:recency' or"):
        parse_policy(SHORT)
    with pytest.raises(PolicyError, match="more than one plugin has the name 'drop'"):
        kvpolicy.load("rkv", merge="drop")
    assert kvpolicy.load("rkv", merge="kvpolicy:drop") == kvpolicy.load("rkv")


def test_policy_of_a_distribution_means_its_own_plugins(install, scorer_source):
    package = "\n@hookimpl\ndef kvpolicy_policies():\n    return ['fake_policies']\n"
    files = {"fake_policies/__init__.py": "", "fake_policies/mine.yaml": SHORT}
    install("a-kv", scorer_source("recency") + package, files=files)
    install("b-kv", scorer_source("recency"))

    assert type(kvpolicy.load("mine").spec.score[0].scorer) is registry().find("score", "a-kv:recency")
    assert type(kvpolicy.load("streaming_llm").spec.score[0].scorer) is registry().find("score", "kvpolicy:recency")


def test_installed_policy_may_always_be_named_in_full(install):
    assert kvpolicy.load("kvpolicy:rkv") == kvpolicy.load("rkv")
    source = "@hookimpl\ndef kvpolicy_policies():\n    return ['fake_policies']\n"
    install("a-kv", source, files={"fake_policies/__init__.py": "", "fake_policies/full.yaml": SHORT})

    assert kvpolicy.load("a-kv:full").name == "full"
    assert kvpolicy.load("kvpolicy:full").spec.budget.share == 1
    with pytest.raises(UnknownPolicyError, match=r"write '[ak][a-z-]*:full' or '[ak][a-z-]*:full'"):
        kvpolicy.load("full")


def test_reader_of_another_distribution_called_all_is_one_all_the_same(install):
    source = (
        "@attrs.frozen\nclass Fake(Reader):\n    name = 'all'\n    def choose(self, question):\n        return None\n"
        "@hookimpl\ndef kvpolicy_stages():\n    return [Fake]\n"
    )
    install("a-kv", source)
    assert kvpolicy.load("streaming_llm", read="a-kv:all").compile(model()).selective
    assert not kvpolicy.load("streaming_llm").compile(model()).selective


def test_default_that_leads_to_itself_is_refused(install):
    source = (
        "@attrs.frozen\nclass Fake(Scorer):\n    name = 'endless'\n"
        "    of: Scorer = parameter(Plugged('score', default='endless'), help='itself')\n"
        "    def score(self, view):\n        return view.keys[..., 0]\n"
        "@hookimpl\ndef kvpolicy_stages():\n    return [Fake]\n"
    )
    install("a-kv", source)

    with pytest.raises(PolicyError, match="must be nested at most"):
        parse_policy(SHORT.replace("recency", "endless"))


def test_class_of_kvpolicy_that_another_distribution_offers_too_stays_ours(install):
    digest = kvpolicy.load("rkv").digest
    offer = "@hookimpl\ndef kvpolicy_stages():\n    return [Attention]\n"
    install("a-kv", f"from kvpolicy_plugins.scorers.attention_based.attention import Attention\n{offer}")

    assert kvpolicy.load("rkv").digest == digest
    assert registry().find("score", "attention").__module__ == "kvpolicy_plugins.scorers.attention_based.attention"
    assert registry().identity(registry().find("score", "attention")) == "attention"


def test_unknown_name_stays_unknown(install):
    install("a-kv", lookalikes())
    with pytest.raises(PluginError, match="unknown name 'recencyy'"):
        registry().find("score", "recencyy", "kvpolicy")
