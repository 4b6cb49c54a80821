"""Plugins are found by name; what is broken is told to whoever asks for it, and to nobody else."""

import subprocess
import sys

import pytest

from kvpolicy.errors import PluginError
from kvpolicy.stages import STAGES, Scorer
from kvpolicy.stages.registry.plugins import registry

FROZEN = "@attrs.frozen\nclass Fake(Scorer):\n    name = 'fake'\n"
SCORE = "    def score(self, view):\n        return view.keys[..., 0]\n"
HOOK = "@hookimpl\ndef kvpolicy_stages():\n    return [Fake]\n"

BROKEN = {
    "import fails": ("raise RuntimeError('no luck')", "RuntimeError: no luck"),
    "import ends the process": ("raise SystemExit('bye')", "SystemExit: bye"),
    "syntax": ("def (:", "SyntaxError: invalid syntax"),
    "missing dependency": ("import surely_not_there", "No module named 'surely_not_there'"),
    "no hook": ("x = 1", "has no hook: mark kvpolicy_stages or kvpolicy_policies with @kvpolicy.hookimpl"),
    "misspelt hook": ("@hookimpl\ndef kvpolicy_stage():\n    return []", "unknown hook 'kvpolicy_stage'"),
    "wrong signature": ("@hookimpl\ndef kvpolicy_stages(model):\n    return []", "PluginValidationError: "),
    "hook raises": ("@hookimpl\ndef kvpolicy_stages():\n    raise KeyError('k')", "KeyError: 'k'"),
    "hook gives no list": ("@hookimpl\ndef kvpolicy_stages():\n    return 3", "'int' object is not iterable"),
    "not a class": ("@hookimpl\ndef kvpolicy_stages():\n    return [3]", "3: must be a subclass of"),
    "not a plugin": ("class Fake: pass\n" + HOOK, "must be a subclass of kvpolicy.stages.Plugin"),
    "no stage": (
        "@attrs.frozen\nclass Fake(Plugin):\n    name = 'fake'\n" + HOOK,
        "Fake: must subclass the contract of one stage: score, allocate.layers, allocate.heads, allocate.joint, select",
    ),
    "stage of another contract": (FROZEN + "    stage = 'merge'\n" + SCORE + HOOK, "must subclass the contract"),
    "abstract": (FROZEN + HOOK, "Fake: must define score"),
    "no name": ("@attrs.frozen\nclass Fake(Scorer):\n" + SCORE + HOOK, "Fake: must have a `name` in lower case"),
    "name with a colon": (FROZEN.replace("'fake'", "'a:b'") + SCORE + HOOK, "must have a `name` in lower case"),
    "not frozen": (FROZEN.replace("frozen", "define") + SCORE + HOOK, "must be decorated with @attrs.frozen"),
    "no attrs": (FROZEN.replace("@attrs.frozen\n", "") + SCORE + HOOK, "must be decorated with @attrs.frozen"),
    "frozen parent only": (
        FROZEN + SCORE + "class Child(Fake):\n    pass\n" + HOOK.replace("Fake", "Child"),
        "Child: must be decorated with @attrs.frozen",
    ),
    "field without a rule": (
        FROZEN + "    x: int = 3\n" + SCORE + HOOK,
        "Fake.x: must be declared with kvpolicy.stages.parameter",
    ),
    "nested field without a rule": (
        "@attrs.frozen\nclass Inner:\n    y: int = 3\n"
        + FROZEN + "    x: Inner = parameter(Nested(Inner), Inner(), help='x')\n" + SCORE + HOOK,
        "Inner.y: must be declared with kvpolicy.stages.parameter",
    ),
    "reserved parameter": (
        FROZEN + "    weight: int = parameter(Integer(), 1, help='w')\n" + SCORE + HOOK,
        "Fake.weight: must have a name in lower case, other than normalise, use, weight",
    ),
    "private parameter": (
        FROZEN + "    _x: int = parameter(Integer(), 1, help='x')\n" + SCORE + HOOK,
        "Fake._x: must have a name in lower case",
    ),
    "one name twice": (
        FROZEN + SCORE + FROZEN.replace("Fake", "Other") + SCORE + HOOK.replace("Fake", "Fake, Other"),
        "two plugins of the stage 'score' have the name 'fake'",
    ),
    "import ends a generator": ("raise GeneratorExit('bye')", "GeneratorExit: bye"),
    "import raises what nobody catches": ("class Odd(BaseException): pass\nraise Odd('odd')", "Odd: odd"),
    "error without words": (
        "class Mute(Exception):\n    def __str__(self):\n        raise RuntimeError('no')\nraise Mute",
        "Mute: <Mute, whose text cannot be read: RuntimeError>",
    ),
    "error whose words end the process": (
        "class Mute(BaseException):\n    def __str__(self):\n        raise SystemExit('no')\nraise Mute",
        "Mute: <Mute, whose text cannot be read: SystemExit>",
    ),
    "error with control characters": ("raise RuntimeError('\\n\\x1b[31mred\\rmore')", "RuntimeError: [31mred"),
    "generator that raises midway": (
        FROZEN + SCORE + "@hookimpl\ndef kvpolicy_stages():\n    yield Fake\n    raise OSError('midway')",
        "OSError: midway",
    ),
    "generator without end": (
        FROZEN + SCORE + "@hookimpl\ndef kvpolicy_stages():\n    while True:\n        yield Fake",
        "hooks return more than 1000 items",
    ),
    "entry point that is no module": (
        "import sys\nclass Odd:\n    def __dir__(self):\n        raise OSError('dir')\nsys.modules[__name__] = Odd()",
        "OSError: dir",
    ),
    "class with a repr that raises": (
        "class Odd(type):\n    def __repr__(cls):\n        raise OSError('repr')\n"
        "class Fake(metaclass=Odd): pass\n" + HOOK,
        "must be a subclass of kvpolicy.stages.Plugin",
    ),
    "name that raises": (
        "import abc\nclass Odd(abc.ABCMeta):\n    @property\n    def name(cls):\n        raise OSError('name')\n"
        "@attrs.frozen(slots=False)\nclass Fake(Scorer, metaclass=Odd):\n" + SCORE + HOOK,
        "OSError: name",
    ),
    "stage that raises": (
        "import abc\nclass Odd(abc.ABCMeta):\n    @property\n    def stage(cls):\n        raise OSError('stage')\n"
        "@attrs.frozen(slots=False)\nclass Fake(Scorer, metaclass=Odd):\n    name = 'fake'\n" + SCORE + HOOK,
        "OSError: stage",
    ),
    "name that is a property": (
        "@attrs.frozen\nclass Fake(Scorer):\n    name = property(lambda self: 'fake')\n" + SCORE + HOOK,
        "must have a `name` in lower case",
    ),
    "name without end": (FROZEN.replace("'fake'", "'a' * 10**6") + SCORE + HOOK, "must have a `name` in lower case"),
    "reference that is no text": (FROZEN + "    reference = 7\n" + SCORE + HOOK, "must have text as its docstring"),
    "flag that is no flag": (
        "@attrs.frozen\nclass Fake(Selector):\n    name = 'fake'\n    best = 'yes'\n"
        "    def select(self, scores, candidates, counts):\n        return candidates\n" + HOOK,
        "must have bools as ragged, best, moves_only, votes, reads_window",
    ),
    "rule without words": (
        "class Mute(Integer):\n    def __str__(self):\n        raise RuntimeError('no')\n"
        + FROZEN + "    x: int = parameter(Mute(), 1, help='x')\n" + SCORE + HOOK,
        "Fake.x: has a rule that cannot be described: RuntimeError: no",
    ),
    "rule with a schema that is none": (
        "class Odd(Integer):\n    def schema(self):\n        return {'minimum': {1}}\n"
        + FROZEN + "    x: int = parameter(Odd(), 1, help='x')\n" + SCORE + HOOK,
        "Fake.x: has a rule that cannot be described: TypeError",
    ),
    "rule of no stage": (
        FROZEN + "    x: object = parameter(Plugged('scored'), help='x')\n" + SCORE + HOOK,
        "Fake.x: must be of one stage: score, ",
    ),
    "bounds in the wrong order": (
        FROZEN + "    x: int = parameter(Integer(2, 1), 1, help='x')\n" + SCORE + HOOK,
        "a rule must have a minimum <= its maximum: from 2 to 1",
    ),
    "no such policy package": ("@hookimpl\ndef kvpolicy_policies():\n    return ['fake_not_there']", "fake_not_there"),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_broken_source_is_recorded_and_breaks_nothing_else(install, case):
    source, message = BROKEN[case]
    install("my-kv", source, entry="mykv", version="1.2")

    assert message in str(registry().broken[0])
    assert str(registry().broken[0]).startswith("plugin 'mykv' (my-kv 1.2): ")
    assert registry().find("score", "recency").name == "recency"


def test_message_of_a_broken_source_is_one_line_however_long_the_error(install):
    install("my-kv", "raise RuntimeError('long ' * 10**6)", entry="mykv")

    message = str(registry().broken[0])
    assert message.startswith("plugin 'mykv' (my-kv 1.0): RuntimeError: long long")
    assert len(message) < 400
    assert "\n" not in message


def test_interrupt_while_plugins_are_imported_ends_the_reading(install):
    install("my-kv", "raise KeyboardInterrupt")

    with pytest.raises(KeyboardInterrupt):
        registry()


def test_distribution_named_like_the_project_offers_nothing(install, scorer_source):
    install("KV.policy".replace(".", ""), scorer_source("mine"), entry="mykv")

    assert "a distribution of this name cannot offer plugins" in str(registry().broken[0])
    assert "mine" not in registry().names("score")


@pytest.mark.parametrize("name", ["mykv", "something_else"])
def test_asking_for_what_a_broken_source_may_have_had_tells_why_it_is_missing(install, name):
    install("my-kv", "raise RuntimeError('no luck')", entry="mykv", version="1.2")

    with pytest.raises(PluginError, match=r"not loaded: plugin 'mykv' \(my-kv 1.2\): RuntimeError: no luck") as caught:
        registry().find("score", name)

    assert isinstance(caught.value.__cause__, PluginError)
    assert str(caught.value.__cause__.__cause__) == "no luck"


def test_plugin_of_another_distribution_is_found_like_a_built_in_one(install, scorer_source):
    install("my-kv", scorer_source("mine", title="The best."), version="1.2")
    record = next(one for one in registry().plugins() if one.name == "mine")

    assert registry().find("score", "mine") is registry().find("score", "my-kv:mine") is record.kind
    assert issubclass(record.kind, Scorer)
    assert (record.distribution, record.version, record.stage, record.summary) == ("my-kv", "1.2", "score", "The best.")
    assert (registry().reference(record.kind), registry().identity(record.kind)) == ("mine", "my-kv:mine")


def test_name_that_two_distributions_have_must_be_qualified(install, scorer_source):
    install("My_KV", scorer_source("recency"))

    with pytest.raises(PluginError) as caught:
        registry().find("score", "recency")

    assert str(caught.value) == (
        "more than one plugin has the name 'recency'; write 'kvpolicy:recency' or 'my-kv:recency'"
    )
    assert registry().find("score", "kvpolicy:recency") is not registry().find("score", "my-kv:recency")
    assert {"kvpolicy:recency", "my-kv:recency"} < set(registry().names("score"))
    assert registry().reference(registry().find("score", "my-kv:recency")) == "my-kv:recency"
    assert registry().identity(registry().find("score", "kvpolicy:recency")) == "recency"


def test_entry_point_name_of_two_distributions_loads_neither_and_names_both(install, scorer_source):
    install("one-kv", scorer_source("mine"), entry="same", version="1.0")
    install("two-kv", scorer_source("mine"), entry="same", version="2.0")

    message = str(registry().broken[0])
    assert "'same'" in message
    assert "one-kv 1.0" in message
    assert "two-kv 2.0" in message
    assert "mine" not in registry().names("score")


def test_same_distribution_twice_on_the_path_counts_once(install, scorer_source):
    install("my-kv", scorer_source("old"), version="1.0")
    install("My_KV", scorer_source("new"), version="2.0")  # prepended: hides the other

    assert not registry().broken
    assert "new" in registry().names("score")
    assert "old" not in registry().names("score")


def test_damaged_metadata_of_any_distribution_is_passed_over(install, scorer_source, tmp_path):
    install("my-kv", scorer_source("mine"))
    info = next(tmp_path.glob("my-kv*")) / "hurt-1.0.dist-info"
    info.mkdir()
    (info / "entry_points.txt").write_text("[kvpolicy]\nno equals sign\n")

    assert "mine" in registry().names("score")


@pytest.mark.parametrize(("value", "loaded"), [("", []), ("other", []), ("a, mykv ,b", ["mine"])])
def test_environment_lists_the_entry_points_that_may_load(install, scorer_source, monkeypatch, value, loaded):
    monkeypatch.setenv("KVPOLICY_PLUGINS", value)
    install("my-kv", scorer_source("mine"), entry="mykv")

    assert [name for name in registry().names("score") if name == "mine"] == loaded
    assert "recency" in registry().names("score")


def test_source_that_may_not_load_is_not_imported(install, monkeypatch):
    monkeypatch.setenv("KVPOLICY_PLUGINS", "")
    module = install("my-kv", "raise RuntimeError('imported')")

    assert registry().broken == ()
    assert module not in sys.modules


def test_unknown_name_gets_the_close_one_and_the_list():
    with pytest.raises(PluginError) as caught:
        registry().find("select", "topk2")

    assert (
        str(caught.value) == "unknown name 'topk2'; did you mean 'topk'? installed: "
        "chunks, critical, fair, kvcrush, mass_segments, omp, sample, temporal_redundancy, topk, whitelist"
    )


def test_policies_of_another_distribution_are_found_by_file_name(install):
    source = "@hookimpl\ndef kvpolicy_policies():\n    return ['fake_policies']"
    files = {"fake_policies/__init__.py": "", "fake_policies/mine.yaml": "x", "fake_policies/rkv.yaml": "x"}
    install("my-kv", source, files=files)

    policies = registry().policies()
    assert policies["mine"].read_text() == "x"
    assert "rkv" not in policies
    assert {"my-kv:rkv", "kvpolicy:rkv", "snapkv"} <= set(policies)


def test_built_in_plugins_keep_the_rules_of_third_party_ones():
    assert registry().broken == ()
    assert {record.stage for record in registry().plugins()} == set(STAGES)
    assert {record.distribution for record in registry().plugins()} == {"kvpolicy"}
    assert all(record.summary for record in registry().plugins())


@pytest.mark.timeout(600)  # a fresh process imports torch and transformers, which is slow on a busy machine
def test_nothing_is_imported_before_a_policy_is_read():
    code = "import kvpolicy, kvpolicy.spec.load, sys; sys.exit('kvpolicy_plugins' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0  # noqa: S603
