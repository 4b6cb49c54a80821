"""What README and docs show works as shown: commands, Python, YAML, links; and the generated page is current."""

import importlib
import inspect
import json
import re
import runpy
import shlex
import sys
from pathlib import Path

import attrs
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import kvpolicy
from kvpolicy.evaluate.harness.record import read_record
from kvpolicy.evaluate.report.page import page_of
from kvpolicy.plan.compress.fusion import fusion_of
from kvpolicy.plan.small_view import small_view
from kvpolicy.spec.load import parse_policy
from kvpolicy.spec.policy import Weighted
from kvpolicy.spec.reference import reference_markdown
from kvpolicy.stages import Geometry
from kvpolicy.stages.conformance import Promises, check_plugin
from kvpolicy_plugins.scorers.attention_free.key_norm import KeyNorm
from tests.docs.evidence import EVIDENCE, evidence
from tests.docs.methods import PAGE as METHODS
from tests.docs.methods import page as methods_page
from tests.docs.methods import policies_without_files, unknown_families
from tests.support.building import COMMAND, printed, run_together
from tests.support.compressing import fused, score
from tests.support.models import build, generate, prompt
from tests.support.policies import held, small

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language, text):
    """The code blocks of a page in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands():
    """Every `kvpolicy …` line of the README's shell blocks; the two set-up commands are run by CI as they stand.

    Those on a model that is downloaded are run in tests/real_models.
    """
    lines = [line for block in blocks("bash", README) for line in block.splitlines()]
    return [line for line in lines if line.startswith("kvpolicy ") and "smollm2" not in line]


@pytest.fixture(scope="module")
def told():
    """What every command prints: as `python -m kvpolicy …` would, one after another."""
    return run_together({command: COMMAND.format(words=shlex.split(command)) for command in commands()}, cwd=ROOT)


@pytest.mark.parametrize("command", commands())
def test_readme_command_runs(told, command):
    assert printed(told, command).strip()


def test_readme_marks_both_set_up_commands():
    assert re.findall(r"<!-- command: (\w+) -->", README) == ["demo", "tests"]


@pytest.mark.parametrize(
    "text", [pytest.param(block, id=page.name) for page in PAGES for block in blocks("yaml", page.read_text("utf-8"))]
)
def test_policy_shown_loads(text):
    assert parse_policy(text, "page").score


def test_first_python_block_of_the_readme_runs(capsys):
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=4, head_dim=8
    )
    inputs = {"input_ids": torch.arange(20)[None], "max_new_tokens": 2, "pad_token_id": 0}

    exec(blocks("python", README)[0], {"model": LlamaForCausalLM(config).eval(), "inputs": inputs})  # noqa: S102

    assert "policy rkv" in capsys.readouterr().out


def test_plugin_of_the_readme_keeps_its_contract(tmp_path, monkeypatch):
    source = next(block for block in blocks("python", README) if "(Scorer)" in block)
    (tmp_path / "shown_in_readme.py").write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)

    check_plugin(importlib.import_module("shown_in_readme").KeyContrast(power=2.0))


@pytest.fixture
def plugins_shown(tmp_path, monkeypatch):
    """The modules of the page on plugins: each of its blocks is a file, named in its first line."""
    page = (ROOT / "docs" / "how-to" / "write-a-plugin.md").read_text("utf-8")
    files = {re.match(r"# (\w+)\.py\n", block)[1]: block for block in blocks("python", page)}
    scorer = {"conftest", "key_contrast", "key_contrast_tile", "test_key_contrast"}
    assert set(files) == scorer | {"reread", "float16", "spare_large", "best_of_layer"}
    for name, block in files.items():
        (tmp_path / f"{name}.py").write_text(block, encoding="utf-8")
    runpy.run_path(str(tmp_path / "conftest.py"))
    monkeypatch.syspath_prepend(tmp_path)
    yield {name: importlib.import_module(name) for name in files if name != "conftest"}
    for name in files:
        sys.modules.pop(name, None)


def test_scorer_shown_keeps_its_contract(plugins_shown):
    shown = plugins_shown["test_key_contrast"].test_contract
    cases = shown.pytestmark[0].args[1]

    for name, check in cases:
        shown(name, check)
    assert "tile gives what score gives" in dict(cases)
    assert "scores the same in any order" in dict(cases)
    assert plugins_shown["key_contrast"].KeyContrast().in_any_order()


def test_scorer_shown_is_fused(plugins_shown):
    """Its tile function gives what its reference gives, beside another one."""
    shown = plugins_shown["key_contrast"].KeyContrast(power=2.0)
    spec = attrs.evolve(small("snapkv").spec, score=(Weighted(shown), Weighted(KeyNorm())))
    view = small_view({"": shown}, Geometry((0,), 4, 2, 16))
    fusion = fusion_of(spec, "")
    assert not any(term.reason for term in fusion.terms)
    torch.testing.assert_close(fused(spec, fusion, [view]).scores[0], score(spec, view)[0])


def test_tile_function_shown_in_the_page_has_the_arguments_of_its_table(plugins_shown):
    page = (ROOT / "docs" / "how-to" / "write-a-plugin.md").read_text("utf-8")
    told = re.findall(r"^\| `(\w+)` \|", page, flags=re.MULTILINE)

    assert told == list(inspect.signature(plugins_shown["key_contrast_tile"].contrast.fn).parameters)


def test_scorer_shown_that_reads_the_prompt_again_keeps_its_contract_and_runs(plugins_shown):
    shown = plugins_shown["reread"].Reread(chunk=7)
    check_plugin(shown)
    policy = small("snapkv")
    policy = attrs.evolve(policy, spec=attrs.evolve(policy.spec, score=(Weighted(shown),)))
    with policy.attach(build()) as attachment:
        generate(attachment.model, prompt(30)[0])
        assert all(layer.peak_entry_bytes > 2 * layer.entry_bytes for layer in attachment.report().layers)


def test_store_shown_keeps_its_contract(plugins_shown):
    check_plugin(plugins_shown["float16"].Float16(recent=3), Promises(error=1e-3))


def test_selector_shown_keeps_its_contract(plugins_shown):
    check_plugin(plugins_shown["spare_large"].SpareLarge())


def test_allocator_shown_keeps_its_contract(plugins_shown):
    check_plugin(plugins_shown["best_of_layer"].BestOfLayer())


def test_tutorial_runs(capsys):
    page = (ROOT / "docs" / "tutorial" / "first-policy.md").read_text("utf-8")

    exec(blocks("python", page)[0], {})  # noqa: S102

    assert "policy snapkv" in capsys.readouterr().out


def test_page_on_prefixes_runs(capsys, tmp_path, monkeypatch):
    """The second block gives the answer of a cache that never was in a file."""
    page = (ROOT / "docs" / "how-to" / "prefixes.md").read_text("utf-8")
    monkeypatch.chdir(tmp_path)
    shown = {}

    for block in blocks("python", page):
        exec(block, shown)  # noqa: S102

    assert "policy snapkv" in capsys.readouterr().out
    assert shown["cache"].rows == 4
    with shown["policy"].attach(shown["model"]) as attachment, torch.no_grad():
        cache = attachment.cache()
        shown["model"](shown["prefix"], past_key_values=cache)
        options = {"max_new_tokens": 16, "do_sample": False}
        expected = shown["model"].generate(**shown["inputs"], past_key_values=cache.fork([0] * 4), **options)
    assert torch.equal(shown["output"], expected)


def test_code_on_regions_runs(capsys):
    page = (ROOT / "docs" / "how-to" / "regions.md").read_text("utf-8")
    shown: dict = {}
    for block in blocks("python", page):
        exec(block, shown)  # noqa: S102

    assert "policy snapkv" in capsys.readouterr().out
    for layer in held(shown["cache"]):
        for head in layer[0]:
            regions = [sum(start <= position < stop for position in head) for start, stop in ((0, 12), (12, 20))]
            assert f"{regions[0]} of the 12 entries of `defence` and {regions[1]} of the 8 of `directive`" in page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", page.read_text("utf-8"))

    assert [target for target in targets if not (page.parent / target).exists()] == []


def test_reference_page_is_current():
    page = ROOT / "docs" / "reference" / "policy-file.md"

    assert page.read_text("utf-8") == reference_markdown(), f"run: kvpolicy schema --markdown > {page.name}"


def test_page_of_methods_is_current():
    assert unknown_families() == policies_without_files() == []
    assert METHODS.read_text("utf-8") == methods_page(), "run: python -m tests.docs.methods"


def test_version_is_one():
    assert kvpolicy.__version__ in (ROOT / "pyproject.toml").read_text("utf-8")


def results_table():
    """The committed results of the demo as the README shows them: answers right, bytes held."""
    results = json.loads((ROOT / "docs" / "images" / "demo-results.json").read_text("utf-8"))
    tasks = results["tasks"]
    lines = [f"| cache | held | {' | '.join(tasks)} |", "|---|---|" + "---|" * len(tasks)]
    for index, first in enumerate(next(iter(tasks.values()))["lines"]):
        own = [task["lines"][index] for task in tasks.values()]
        label = first["policy"] if first["share"] is None else f"{first['policy']} {first['share']:.0%}"
        held = sum(one["held_share"] for one in own) / len(own)
        rights = [f"{one['correct']['mean']:.0%}" for one in own]
        lines.append(f"| {label} | {held:.0%} | {' | '.join(rights)} |")
    return "\n".join(lines)


EVALUATIONS = sorted((ROOT / "docs" / "reference" / "evaluation").iterdir())


@pytest.mark.parametrize("folder", EVALUATIONS, ids=lambda folder: folder.name)
def test_pages_of_evaluations_are_those_of_their_records(folder):

    assert (folder / "evaluation.md").read_text("utf-8") == page_of(read_record(folder / "cells.jsonl"), "tradeoff.png")


def test_policies_of_which_others_are_better_are_those_of_the_records():
    """`python -m tests.docs.evidence` writes the file anew."""
    assert json.loads(EVIDENCE.read_text("utf-8")) == evidence()


def gates_on_record(name):
    found = json.loads((ROOT / "docs" / "images" / f"gates-{name}.json").read_text("utf-8"))["facts"]["gates"]
    return {one["gate"]: one for one in found}


def test_gates_in_the_page_on_performance_are_those_on_record():
    page = (ROOT / "docs" / "explanation" / "performance.md").read_text("utf-8").splitlines()
    rows = {line.split("`")[1]: [cell.strip() for cell in line.split("|")] for line in page if line.startswith("| `")}
    for column, record in ((3, gates_on_record("1-thread")), (5, gates_on_record("2-threads"))):
        assert record.keys() == rows.keys()
        for gate, one in record.items():
            value = f"{one['value']:.3g}"
            assert rows[gate][column] == (value if one["passed"] else f"**{value}**"), gate
            assert rows[gate][column + 1] == ("" if one["noise"] is None else f"{one['noise']:.0%}".replace("%", " %"))


def test_results_in_the_readme_are_those_on_record():
    assert results_table() in README, results_table()
