"""The page of methods, from the shipped policies, the families of published results, and the records of evaluations.

`python -m tests.docs.methods` writes docs/reference/methods.md; a test says whether it is current.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import kvpolicy
from kvpolicy.evaluate.harness.record import read_record
from kvpolicy.evaluate.report.summary import Line, Summary
from kvpolicy.evaluate.tasks.case import METRICS
from kvpolicy.spec.policy import PolicySpec
from kvpolicy.spec.traits import SAVES, compresses, needs, saves
from tests.golden.families import FOLDER, TESTED, family_of

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "reference" / "methods.md"
POLICIES = ROOT / "policies" / "kvpolicy_policies"
RECORD = ROOT / "docs" / "reference" / "evaluation" / "smollm2-methods" / "cells.jsonl"
TASKS = {"text": "KL"}

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

The shipped policies: where each is from, how it is composed, which published results it is held to, and what it loses
on a real model. Made by `python -m tests.docs.methods`.

- **KL** is the divergence of predictions from the full cache's on three essays, nats a token: mean with a 95 %
  bootstrap interval, of the [record](evaluation/smollm2-methods/evaluation.md) on SmolLM2-135M and texts of 1024
  tokens, at shares of the bytes of a full cache, window and state included. Three texts and one small model: they show
  which methods differ by much. Methods that leave the prompt as it is, and evict while a model reasons, cannot be
  judged by it.
- **Published results** are files of numbers that the authors' code has given (another library's, or a float64
  reference, where there is none). The tests compare scores within rounding and kept entries exactly. All that evict are
  also held to an oracle in `tests/oracles/`: the method as a loop over entries inside the plain model.
"""
_COLUMNS = tuple(
    f"{task}{share}"
    for task in TASKS.values()
    for share in ("", *(f" at {share} %" for share in ("25", "12.5", "6.25")))
)


def page() -> str:
    """The text of the page."""
    specs = {path.stem: kvpolicy.load(path).spec for path in sorted(POLICIES.glob("*.yaml"))}
    kinds = {title: [name for name, spec in specs.items() if saves(spec) == kind] for kind, title in SAVES.items()}
    results = _results()
    parts = [_HEAD]
    for title, names in kinds.items():
        measured = [name for name in names if name in results]
        if measured:
            parts.append(f"**{title}**\n")
            parts.append("\n".join(_table(measured, results)) + "\n")
    for title, names in kinds.items():
        parts.append(f"## {title}\n")
        parts += [_section(name, specs[name]) for name in names]
    return "\n".join(parts)


def _table(names: Sequence[str], results: Mapping[str, Mapping[str, str]]) -> Iterator[str]:
    columns = [column for column in _COLUMNS if any(column in results[name] for name in names)]
    yield f"| policy | {' | '.join(columns)} |"
    yield f"|---|{'---|' * len(columns)}"
    for name in names:
        yield f"| [{name}](#{name}) | {' | '.join(results[name].get(column, '') for column in columns)} |"


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


def _results() -> dict[str, dict[str, str]]:
    """By policy, its numbers by column."""
    found: dict[str, dict[str, str]] = {}
    for task in Summary(read_record(RECORD)).tasks:
        for line in task.measured:
            name = f"{TASKS[task.task]}{'' if line.share is None else f' at {100 * line.share:.4g} %'}"
            found.setdefault(line.policy, {})[name] = _told(line, task.metric)
    return found


def _told(line: Line, metric: str) -> str:
    estimate = line.estimate(metric)
    held = f" at {line.held_share:.0%}" if line.share is None else ""
    if METRICS[metric].percent:
        return f"{estimate.mean:.0%} [{estimate.low:.0%}, {estimate.high:.0%}]{held}"
    return f"{estimate.mean:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]{held}"


def unknown_families() -> list[str]:
    """Families that this page names and no test knows."""
    known = {family for tested in TESTED.values() for family in tested}
    return sorted({family for families in GOLDEN.values() for family in families} - known)


def policies_without_files() -> list[str]:
    """Names here that are no shipped policies."""
    return sorted(name for name in GOLDEN if not (POLICIES / f"{name}.yaml").exists())


if __name__ == "__main__":
    PAGE.write_text(page(), "utf-8")
