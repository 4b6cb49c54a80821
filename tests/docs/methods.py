"""The page of methods, from the shipped policies, the families of published results, and the records of evaluations.

`python -m tests.docs.methods` writes docs/reference/methods.md; a test says whether it is current.
"""

import textwrap
from collections.abc import Iterator, Mapping
from pathlib import Path

import kvpolicy
from kvpolicy.evaluate.harness.record import EvaluationRecord, read_record
from kvpolicy.evaluate.report.summary import Line
from kvpolicy.spec.policy import PolicySpec
from kvpolicy.spec.traits import SAVES, compresses, needs, saves
from tests.docs.method_tables import Results, bytes_and_times, loss_by_share, loss_by_task
from tests.golden.families import FOLDER, TESTED, family_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "methods.md"
POLICIES = ROOT / "policies" / "kvpolicy_policies"
RECORDS = ROOT / "docs" / "reference" / "evaluation"
# By record and task, what the numbers are called.
REAL_MODEL, TESTBED = "smollm2-methods", "testbed"
TITLES = {
    REAL_MODEL: {"text": "KL divergence", "needle": "needle", "needle-unseen": "needle-unseen"},
    TESTBED: {"recall": "recall", "recall-unseen": "recall-unseen", "tracking": "tracking"},
}

# The published results that a policy's plugins are held to, by families of tests/golden/families.py.
GOLDEN = {
    "adakv": ("adakv", "spec_adakv"),
    "ams": ("ams",),
    "attention_matching": ("attention_matching_hak",),
    "attention_matching_omp": ("attention_matching_omp",),
    "cake": ("cake_layers", "cake_adjust"),
    "compactor": ("compactor",),
    "criticaladakv": ("criticalkv",),
    "criticalkv": ("criticalkv",),
    "curkv": ("cur",),
    "expected_attention": ("expected_attention",),
    "finch": ("finch",),
    "gkv": ("gkv", "gkv_similarity"),
    "headkv": ("headkv_budgets", "head_budgets"),
    "h2o": ("h2o_decode", "h2o_prefill"),
    "infinipot_v": ("infinipotv", "infinipotv_stream"),
    "keepkv": ("keepkv", "keepkv_released_code", "vote_bias_attention"),
    "keydiff": ("keydiff",),
    "kivi2": ("kivi", "kivi_decode"),
    "kivi4": ("kivi", "kivi_decode"),
    "kvcrush": ("kvcrush_anchors",),
    "kvzip": ("kvzip_scoring", "kvzip_end_to_end"),
    "kvzip_plus": ("kvzip_end_to_end_plus",),
    "lagkv": ("lagkv",),
    "leverage": ("compactor",),
    "pyramidkv": ("pyramidkv_budgets", "pyramidkv_kept", "spec_pyramidkv"),
    "d2o": ("mergers_reference",),
    "q_filters": ("qfilters",),
    "rkv": ("rkv", "rkv_rounds", "rkv_similarity"),
    "rpc": ("rpc",),
    "rocketkv": ("rocketkv", "rocketkv_budgets"),
    "rotation3": ("rotation_codebook",),
    "rotation4": ("rotation_codebook",),
    "nova_vq": ("nova_vq",),
    "sals12": ("sals",),
    "sals25": ("sals",),
    "snapkv": ("snapkv", "snapkv_ties", "decode_snapkv"),
    "streaming_llm": ("streamingllm",),
    "surfacelogickv": ("head_budgets",),
    "tada": ("tada",),
    "tova": ("tova",),
    "triattention": ("triattention",),
    "random": ("random_pp", "random_randkv"),
    "vase": ("vase_attnv",),
    "vase_dkv": ("vase_dkv",),
    "fair": ("fair_eviction",),
}
_HEAD = """# Methods

The shipped policies: where each is from, how it is composed, which published results it is held to, what it loses, and
what it costs. Made by `python -m tests.docs.methods`.

Each group of policies begins with tables of what was measured; a policy that a record lacks is not in its table.
Numbers are means over cases with 95 % bootstrap intervals, unless all cases agree. Columns are shares of the bytes of
a full cache, window and state included.

{tasks}
- **Bytes and time**, of the first of these tasks: what one sequence holds at the end, as a share of a full cache's; the
  forward over a prompt, its compression included, and a decode step behind it, as multiples of the full cache's in the
  same run. A policy that compresses prompts alone holds what is generated on top of its share. One forward is timed for
  each policy and share, on a CPU that may do other things: an indication, and not of what kernels on a GPU take.
- **Published results** are files of numbers that the authors' code has given (another library's, or a float64
  reference, where there is none). The tests compare scores within rounding and kept entries exactly. All that evict are
  also held to an oracle in `tests/oracles/`: the method as a loop over entries inside the plain model.

The models are small and the cases few: they show which methods differ by much. Methods that leave the prompt as it is,
and evict while a model reasons, are measured here as if they did compress it (*on prompts*): that tells what their
choice of entries loses, and not how a model reasons with them.
"""
# Policies that leave prompts alone, changed so that they compress them.
ON_PROMPTS = {
    "ams": "ams+compress={prefill: true, every: 512}",
    "random": "random+compress={prefill: true, every: 64}+protect={recent: 3.125%}",
    "rpc": "rpc+budget=2048+compress={prefill: true, every: 768}+protect={recent: 32}",
    "triattention": "triattention+compress={prefill: true, every: 128}+protect={sinks: 0, recent: 0}",
    "vase": "vase+compress={prefill: true, every: 64}",
}
_MEANS = {
    "text": "the divergence of predictions of the text that follows from the full cache's, nats a token",
    "needle": "answers that are right, to a question about one number in a text; `needle-unseen`: asked once the text "
    "was compressed",
    "recall": "answers that are right, to questions about generated facts; `recall-unseen`: asked once the facts were "
    "compressed; `tracking`: chains of assignments",
}


def page() -> str:
    """The text of the page."""
    return page_of({name: read_record(RECORDS / name / "cells.jsonl") for name in TITLES})


def page_of(records: Mapping[str, EvaluationRecord]) -> str:
    """The text of the page with the numbers of some records, by the names of `TITLES`."""
    specs = {path.stem: kvpolicy.load(path).spec for path in sorted(POLICIES.glob("*.yaml"))}
    real, testbed = (
        Results(records[name], TITLES[name], f"evaluation/{name}/evaluation.md") for name in (REAL_MODEL, TESTBED)
    )
    parts = [_HEAD.format(tasks="\n".join((*_tasks(real), *_tasks(testbed))))]
    for kind, title in SAVES.items():
        names = [name for name, spec in specs.items() if saves(spec) == kind]
        shown = [ON_PROMPTS.get(name, name) for name in names]
        parts.append(f"## {title}\n")
        parts += [*loss_by_task(real, shown), *loss_by_share(testbed, shown), *bytes_and_times(real, shown)]
        parts += [_section(name, specs[name]) for name in names]
    return "\n".join(parts)


def _tasks(results: Results) -> Iterator[str]:
    """What the tasks of a record are, how many cases they have, and how well the full cache does them."""
    for task in results.tasks:
        if task.task not in _MEANS:
            continue
        told = f"{_MEANS[task.task]}. {task.cases} cases, {results.setting}"
        if task.metric == "correct":
            full = (
                f"{results.titles[each.task]} {_mean(each.full)}" for each in results.tasks if each.metric == "correct"
            )
            told += f"; with the full cache: {', '.join(full)}"
        text = f"- **{results.titles[task.task]}**: {told}."
        yield textwrap.fill(text, 120, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _mean(line: Line | None) -> str:
    return "not measured" if line is None else f"{line.estimate('correct').mean:.0%}"


def _section(name: str, spec: PolicySpec) -> str:
    text = (POLICIES / f"{name}.yaml").read_text("utf-8").splitlines()
    remarks = " ".join(line[2:] for line in text if line.startswith("# "))
    composed = [line for line in text if not line.startswith(("#", "summary:", "reference:"))]
    lines = [f"### {name}", "", f"{spec.summary}." + (f" ({spec.reference})" if spec.reference else "")]
    lines += ["", remarks] if remarks else []
    lines += ["", "```yaml", *composed, "```", ""]
    when, needed = compresses(spec), needs(spec)
    if len(when) == 1:
        lines.append(f"- Evicts only {'from the prompt' if when[0] == 'prompt' else 'while decoding'}.")
    if needed:
        lines.append(f"- Needs: {', '.join(needed)}.")
    files = [path.stem for path in sorted(FOLDER.glob("*.npz")) if family_of(path.stem) in GOLDEN.get(name, ())]
    if files:
        lines.append(f"- Published results: {', '.join(files)}.")
    return "\n".join(lines).rstrip() + "\n"


def unknown_families() -> list[str]:
    """Families that this page names and no test knows."""
    known = {family for tested in TESTED.values() for family in tested}
    return sorted({family for families in GOLDEN.values() for family in families} - known)


def policies_without_files() -> list[str]:
    """Names here that are no shipped policies."""
    return sorted(name for name in GOLDEN if not (POLICIES / f"{name}.yaml").exists())


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
