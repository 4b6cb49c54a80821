"""`list`, `show`, `check`, `plugins`, `schema`, and how errors are told."""

import json
import subprocess
import sys
from importlib import resources

import pytest

import kvpolicy
from kvpolicy.errors import UnknownPolicyError
from kvpolicy.spec.schema import json_schema
from kvpolicy.spec.traits import SAVES


def test_list_names_every_installed_policy(kv):
    """Name, budget and summary, as a table and as JSON."""
    table, data = kv("list"), kv("list", "--json")
    listed = {one["name"]: one for one in json.loads(data.stdout)}

    assert table.exit_code == data.exit_code == 0
    assert {"full", "rkv", "snapkv", "blend"} <= set(listed)
    assert listed["rkv"]["budget"] == "1024"
    for one in listed.values():
        assert one["name"] in table.stdout
        assert one["summary"] in table.stdout


def test_list_groups_policies_by_what_they_save_and_says_what_they_need(kv):
    table, data = kv("list"), kv("list", "--json")
    listed = {one["name"]: one for one in json.loads(data.stdout)}

    def told(name):
        return listed[name]["saves"], listed[name]["compresses"], listed[name]["needs"]

    both = ["prompt", "decoding"]
    assert told("full") == ("nothing", [], [])
    assert told("snapkv") == ("entries", both, ["recent queries"])
    assert told("kvzip") == ("entries", ["prompt"], ["passes over the prompt"])
    more = ["passes over the prompt", "output projection", "hidden states"]
    assert told("kvzip_plus") == ("entries", ["prompt"], more)
    assert told("triattention") == ("entries", ["decoding"], ["calibration", "rotary embedding"])
    assert told("h2o") == ("entries", both, ["attention of all queries"])
    assert told("d2o")[0] == "merged entries"
    assert told("kivi4") == ("bits", [], [])
    assert told("rkv_int4") == ("entries and bits", both, ["recent queries"])
    assert told("sals25") == ("reads", [], ["calibration"])
    lines = table.stdout.splitlines()
    titles = [next(number for number, line in enumerate(lines) if title in line) for title in SAVES.values()]
    assert titles == sorted(titles)
    for name, kind in (
        ("full", 0),
        ("snapkv", 1),
        ("d2o", 2),
        ("kivi4", 3),
        ("rkv_int4", 4),
        ("rocketkv", 5),
        ("quest", 6),
    ):
        row = next(number for number, line in enumerate(lines) if line.startswith(f"│ {name} "))
        assert titles[kind] < row < [*titles, len(lines)][kind + 1]
    assert "evicts only from the prompt" in table.stdout
    assert "needs: passes over the prompt" in table.stdout


@pytest.mark.parametrize(
    ("by", "group", "inside", "outside"),
    [
        ("stages", "score: attention", "snapkv", "keydiff"),
        ("stages", "allocate.joint: headkv", "headkv_centred", "snapkv"),
        ("stages", "allocate.layers: pyramid", "pyramidkv", "snapkv"),
        ("stages", "merge: window_fit", "headkv_centred", "rkv_centred"),
        ("stages", "store: rotation", "rkv_centred", "kivi4"),
        ("stages", "nothing", "full", "kivi4"),
        ("needs", "calibration", "headkv", "snapkv"),
        ("needs", "nothing", "streaming_llm", "snapkv"),
    ],
)
def test_list_groups_policies_by_what_they_are_composed_of_or_need(kv, by, group, inside, outside):
    """A policy stands in every group that it belongs to, and in no other."""
    table, listed = kv("list", "--by", by), json.loads(kv("list", "--json").stdout)
    assert table.exit_code == 0
    titles = {"nothing", *(part for one in listed for part in one[by])}
    groups = {}
    rows = [line.strip("│").split("│") for line in table.stdout.splitlines() if line.startswith("│")]
    for name, _, text in ([cell.strip() for cell in row] for row in rows):
        if not name and text in titles:
            groups[text] = []
        elif name:
            groups[list(groups)[-1]].append(name)
    assert set(groups) == titles
    for title, names in groups.items():
        assert names == [one["name"] for one in listed if title in (one[by] or ["nothing"])]
    assert inside in groups[group]
    assert outside not in groups[group]


def test_list_says_which_policies_others_are_better_than(kv):
    """As the file says that the records of the documentation give; policies of others have no such line."""
    table, data = kv("list"), kv("list", "--json")
    listed = {one["name"]: one["better"] for one in json.loads(data.stdout)}
    by_model = json.loads(resources.files("kvpolicy_policies").joinpath("evidence.json").read_text("utf-8"))

    assert by_model["smollm2"]
    for model, better in by_model.items():
        for name, policy in listed.items():
            assert policy.get(model) == better.get(name)
    assert not listed["full"]
    assert "better: blend3 on smollm2 and testbed" in table.stdout
    assert "Time is not compared." in table.stdout


def test_show_prints_yaml_that_loads_to_the_same_policy(kv, tmp_path):
    """Canonical YAML; an override is seen in it."""
    result = kv("show", "rkv", "--budget", "10%")
    (tmp_path / "shown.yaml").write_text(result.stdout)

    assert result.stdout.startswith("kvpolicy: 1\nname: rkv\n")
    assert kvpolicy.load(tmp_path / "shown.yaml") == kvpolicy.load("rkv", budget="10%")


def test_show_as_json_has_digest_and_origin(kv):
    """For programs: plain data beside the digest."""
    data = json.loads(kv("show", "snapkv", "--json").stdout)

    assert data["digest"] == kvpolicy.load("snapkv").digest
    assert data["origin"].endswith("snapkv.yaml")
    assert data["policy"]["protect"] == {"sinks": 0, "recent": 32}


def test_unknown_names_are_one_line_with_the_close_one(kv):
    """Exit code 2, no traceback, nothing on stdout."""
    result = kv("show", "snapvk")

    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: unknown policy 'snapvk'; did you mean 'snapkv'?")
    assert len(result.stderr.splitlines()) == 1


def test_a_wrong_budget_is_told_with_its_rule(fails):
    """A budget that is none of the three forms."""
    tokens, size = "a number of tokens from 1 to 1000000000", 'a size such as "2GiB", up to 2^60 bytes'
    rule = f'must be {tokens}, a share such as "10%" or "25% of generated", or {size}'
    fails(f"override budget: {rule}: '12 miles'", "show", "rkv", "--budget", "12 miles")


@pytest.mark.parametrize("words", [("--traceback", "show", "nope"), ("show", "nope", "--traceback")])
def test_traceback_is_for_those_who_ask(kv, words):
    """The error itself comes out, wherever the option stands."""
    assert isinstance(kv(*words).exception, UnknownPolicyError)


def test_check_says_good_with_the_digest(kv, good):
    """Exit code 0."""
    result = kv("check", good)

    assert result.exit_code == 0
    assert result.stdout == f"{good}: good ({kvpolicy.load(good).digest})\n"


def test_check_tells_all_problems_of_all_files(kv, good, bad, tmp_path):
    """Good files are told too; exit code 1, for CI."""
    result = kv("check", good, bad, tmp_path / "missing.yaml")

    assert result.exit_code == 1
    assert result.stdout.startswith(f"{good}: good")
    told = result.stderr.splitlines()
    assert len(told) == 3
    assert f"{bad}:2:9: budget: must be" in told[0]
    assert f"{bad}:4:11: score[0].use: unknown name 'recencyy'; did you mean 'recency'?" in told[1]
    assert told[2].endswith(": no such file")


def test_check_as_json(kv, good, bad):
    """One object a file."""
    result = kv("check", "--json", good, bad)
    first, second = json.loads(result.stdout)

    assert result.exit_code == 1
    assert (first["problems"], len(first["digest"])) == ([], 16)
    assert (len(second["problems"]), second["digest"]) == (2, None)


def test_plugins_shows_broken_ones_beside_the_others(kv, install, scorer_source):
    """A distribution that cannot be imported is named, and why."""
    install("works", scorer_source("mine"))
    install("broken-one", "raise RuntimeError('no luck')")
    result, data = kv("plugins"), json.loads(kv("plugins", "--json").stdout)

    assert result.exit_code == 0
    for expected in ("mine", "works 1.0", "A fake scorer.", "redundancy", "allocate.heads"):
        assert expected in result.stdout
    assert "broken: plugin 'broken-one' (broken-one 1.0): RuntimeError: no luck" in result.stderr
    assert [one["error"] for one in data["broken"]] == ["plugin 'broken-one' (broken-one 1.0): RuntimeError: no luck"]
    assert {"name", "stage", "distribution", "version", "summary", "reference"} == set(data["plugins"][0])


def test_schema_is_the_one_that_files_are_checked_by(kv):
    """JSON Schema on stdout, nothing else."""
    assert json.loads(kv("schema").stdout) == json_schema()


def test_help_names_all_commands(kv):
    """And a bare call shows the help."""
    result = kv("--help")

    assert result.exit_code == 0
    for command in ("demo", "run", "list", "show", "check", "plan", "plugins", "schema"):
        assert command in result.stdout
        assert kv(command, "--help").exit_code == 0


def test_version(kv):
    """The version of the distribution."""
    assert kv("--version").stdout == f"{kvpolicy.__version__}\n"


def test_module_and_entry_point_are_the_same_program(tmp_path):
    """`python -m kvpolicy`: exit code and message of a bad call."""
    call = [sys.executable, "-m", "kvpolicy", "show", "nope"]
    result = subprocess.run(call, capture_output=True, text=True, check=False, cwd=tmp_path)  # noqa: S603 - our own

    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("error: unknown policy 'nope'")


WITHOUT_MODELS = """
import sys
import kvpolicy
assert "torch" not in sys.modules
from typer.testing import CliRunner
from kvpolicy.cli.app import app
for words in ("list", "show rkv --json", "check {file}", "plugins", "schema"):
    result = CliRunner().invoke(app, words.split())
    assert result.exit_code == 0, result.output
print("transformers" in sys.modules, kvpolicy.load("rkv").name, "transformers" in sys.modules)
"""


def test_commands_about_policies_do_not_import_transformers(tmp_path):
    """That takes seconds. Whoever names a class or function of the package gets it, and imports what it needs."""
    file = tmp_path / "mine.yaml"
    file.write_text("kvpolicy: 1\nname: mine\nbudget: 64\nscore: [recency]\n", "utf-8")
    program = WITHOUT_MODELS.replace("{file}", str(file))
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)  # noqa: S603 - fixed

    assert ran.stdout.split() == ["False", "rkv", "True"], ran.stderr


def test_the_names_of_the_package():
    assert set(kvpolicy.__all__) <= set(dir(kvpolicy))
    assert all(callable(getattr(kvpolicy, name)) for name in kvpolicy.__all__)
    with pytest.raises(AttributeError, match=r"^module 'kvpolicy' has no attribute 'lode'$"):
        _ = kvpolicy.lode
