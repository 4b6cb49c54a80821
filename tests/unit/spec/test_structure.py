"""A file becomes a policy, or every problem in it is told with its place."""

from pathlib import Path

import attrs
import pytest

from kvpolicy.errors import ParameterError, PluginError, PolicyError
from kvpolicy.spec.budget import Budget
from kvpolicy.spec.load import parse_policy
from kvpolicy.spec.policy import Compress, PolicySpec, Protect, Weighted
from kvpolicy.stages import STAGES
from kvpolicy.stages.registry.plugins import registry

HEAD = "kvpolicy: 1\nbudget: 64\n"
EXAMPLE = """\
kvpolicy: 1                     # schema version, required
name: rkv
summary: Redundancy-aware eviction for long chains of thought
reference: arXiv:2505.24133
budget: 1024                    # tokens kept per KV head, averaged over layers and heads; also "10%" (of the tokens seen) or "2GiB"
compress: {prefill: true, every: 128}     # when: after prefill; then each time `every` new tokens have come on top of the budget
protect: {sinks: 0, recent: 8}  # never evicted
score:                          # weighted sum; larger = keep
  - {use: attention, queries: 8, group: max, pool: {kind: max, size: 7}, weight: 0.1}
  - {use: redundancy, threshold: 0.5, forgive: 1, weight: -0.9}
allocate: {layers: uniform, heads: uniform}
select: {use: topk}
merge: {use: drop}
"""  # noqa: E501 - as in the documentation


def bad_policies():
    """The cases of bad_policies.txt: the text of a file, then its messages."""
    text = (Path(__file__).parent / "bad_policies.txt").read_text()
    for case in text.split("=== ")[1:]:
        name, _, rest = case.partition("\n")
        policy, _, messages = rest.partition(">>>\n")
        yield pytest.param(policy, messages.strip(), id=name)


@pytest.fixture
def spelt_out():
    """Puts in for `<score>` and the like what the messages list, which grows with the plugins."""
    signs = {f"<{stage}>": ", ".join(registry().names(stage)) for stage in STAGES}
    signs["<attention>"] = ", ".join(field.name for field in attrs.fields(registry().find("score", "attention")))
    signs["<top>"] = "kvpolicy, " + ", ".join(field.name for field in attrs.fields(PolicySpec))
    signs["<budget>"] = (
        'a number of tokens from 1 to 1000000000, a share such as "10%" or "25% of generated", or a size such as '
        '"2GiB", up to 2^60 bytes'
    )

    def spell_out(messages):
        for sign, words in signs.items():
            messages = messages.replace(sign, words)
        return messages

    return spell_out


@pytest.mark.parametrize(("text", "messages"), list(bad_policies()))
def test_bad_policy_gives_exactly_these_messages(text, messages, spelt_out):
    with pytest.raises(PolicyError) as caught:
        parse_policy(text, "p.yaml")

    assert str(caught.value) == spelt_out(messages)


def test_messages_come_one_by_one_too():
    with pytest.raises(PolicyError) as caught:
        parse_policy(HEAD + "score:\n  - {use: attention, queries: many}\nselect: topk2\n", "rkv.yaml")

    first, second = caught.value.problems
    assert (first.where, first.message) == (
        "rkv.yaml:4:31: score[0].queries",
        "must be an integer from 1 to 4096: 'many'",
    )
    assert second.where == "rkv.yaml:5:9: select"


def test_example_of_the_documentation_says_what_it_seems_to_say():
    spec = parse_policy(EXAMPLE, "rkv.yaml")
    attention, redundancy = spec.score

    assert (spec.name, spec.reference) == ("rkv", "arXiv:2505.24133")
    assert spec.budget == Budget(tokens=1024)
    assert spec.compress == Compress(prefill=True, every=128)
    assert spec.protect == Protect(sinks=0, recent=8)
    assert (attention.weight, redundancy.weight) == (0.1, -0.9)
    assert (attention.scorer.name, attention.scorer.queries, attention.scorer.group) == ("attention", 8, "max")
    assert (attention.scorer.pool.kind, attention.scorer.pool.size) == ("max", 7)
    assert (redundancy.scorer.threshold, redundancy.scorer.forgive) == (0.5, 1)


def test_what_is_left_out_gets_its_default():
    spec = parse_policy(HEAD + "score: [recency]\n", default_name="stem")

    assert (spec.name, spec.summary, spec.reference) == ("stem", "", "")
    assert (spec.compress, spec.protect) == (Compress(), Protect())
    plugins = (spec.allocate.layers, spec.allocate.heads, spec.select, spec.merge, spec.store)
    assert [plugin.name for plugin in plugins] == ["uniform", "uniform", "topk", "drop", "plain"]
    assert spec.score == (Weighted(registry().find("score", "recency")()),)


@pytest.mark.parametrize(
    "text", ["recency", "{use: recency}", "{use: recency, weight: 1}", "{weight: 1.0, use: 'recency'}"]
)
def test_word_and_mapping_mean_the_same(text):
    assert parse_policy(f"{HEAD}score: [{text}]\n") == parse_policy(f"{HEAD}score: [recency]\n")


def test_byte_order_mark_and_windows_line_ends_load():
    text = "\ufeff" + EXAMPLE.replace("\n", "\r\n")

    assert parse_policy(text) == parse_policy(text.encode()) == parse_policy(EXAMPLE)


def test_scorer_may_be_built_on_a_scorer():
    spec = parse_policy(HEAD + "score:\n  - {use: history, of: {use: attention, queries: 3}, scale: none, weight: 2}\n")

    history = spec.score[0]
    assert (history.scorer.of.queries, history.scorer.scale, history.weight) == (3, "none", 2.0)


def test_plugin_of_a_third_party_is_read_by_its_rules(install, scorer_source):
    install("my-kv", scorer_source("mine", "size: int = parameter(Integer(minimum=2), help='how many')"))
    text = HEAD + "score:\n  - {use: mine, size: SIZE}\n"

    assert parse_policy(text.replace("SIZE", "3")).score[0].scorer.size == 3
    with pytest.raises(PolicyError, match=r"^p:4:23: score\[0\].size: must be an integer from 2 to 1000000000: 1$"):
        parse_policy(text.replace("SIZE", "1"), "p")


def test_rule_between_parameters_is_told_at_the_mapping(install, scorer_source):
    check = "def __attrs_post_init__(self): raise kvpolicy.errors.ParameterError('low: must be < high: 3')"
    install("my-kv", scorer_source("mine", check))

    with pytest.raises(PolicyError, match=r"^p:3:9: score\[0\]: low: must be < high: 3$"):
        parse_policy(HEAD + "score: [mine]\n", "p")


def test_plugin_that_fails_on_a_value_gives_our_error(install, scorer_source):
    rule = "size: int = parameter(Odd(), 1, help='x')"
    source = (
        "@attrs.frozen\nclass Odd(Rule):\n    def accepts(self, value): return value % 2 == 1\n"
        "    def schema(self): return {}\n    def __str__(self): return 'odd'\n"
    )
    install("my-kv", source + scorer_source("mine", rule, "def __attrs_post_init__(self): 1 / (self.size - 3)"))

    with pytest.raises(PolicyError, match=r"score\[0\].size: must be odd: 'x'$"):
        parse_policy(HEAD + "score: [{use: mine, size: x}]\n")
    with pytest.raises(PolicyError, match=r"score\[0\]: Fake failed: ZeroDivisionError: ") as caught:
        parse_policy(HEAD + "score: [{use: mine, size: 3}]\n")
    assert isinstance(caught.value.__cause__, ZeroDivisionError)


def test_policy_that_asks_for_a_broken_plugin_tells_the_cause(install):
    install("my-kv", "raise RuntimeError('no luck')", entry="mine", version="1.2")

    assert parse_policy(HEAD + "score: [recency]\n").score
    with pytest.raises(PolicyError, match=r"not loaded: plugin 'mine' \(my-kv 1.2\): RuntimeError: no luck") as caught:
        parse_policy(HEAD + "score: [mine]\n")
    assert isinstance(caught.value.__cause__, PluginError)
    assert str(caught.value.__cause__.__cause__.__cause__) == "no luck"


def test_python_may_build_a_policy_too():
    spec = parse_policy(HEAD + "score: [recency]\n")
    parts = {field.name: getattr(spec, field.name) for field in attrs.fields(PolicySpec)}

    assert PolicySpec(**{**parts, "budget": 64}) == spec
    with pytest.raises(ParameterError, match="budget: must be a number of tokens from 1 to 1000000000"):
        PolicySpec(**{**parts, "budget": 0})
