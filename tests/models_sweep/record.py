"""What the sweep found, as a file, and the page made from it."""

import json
import platform
import re
from collections.abc import Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tests.models_sweep.examine import EXACT, NOT_TRIED, REFUSED, WRONG, Verdict
from tests.models_sweep.pairs import Pair

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "docs" / "reference" / "models.json"
_LONGEST = 160  # characters of a reason
PAGE = ROOT / "docs" / "reference" / "models.md"


def versions() -> dict[str, str]:
    """Of what a verdict depends on."""
    return {"python": platform.python_version(), **{name: version(name) for name in ("torch", "transformers")}}


def write(verdicts: Iterable[Verdict], others: dict[str, Any]) -> None:
    """Replace the record, which keeps the `others`, and the page with it."""
    new = {one.name: {"class": one.model_class, "kind": one.kind, "why": list(one.why)} for one in verdicts}
    known = {**others, **new}
    text = json.dumps({"versions": versions(), "verdicts": dict(sorted(known.items()))}, indent=1)
    RECORD.write_text(text + "\n", encoding="utf-8")
    write_page()


def read() -> dict[str, Any]:
    """The record: `versions`, and `verdicts` by the name of a pair."""
    found: dict[str, Any] = json.loads(RECORD.read_text(encoding="utf-8"))
    return found


def write_page() -> None:
    """Replace the page by what the record says."""
    PAGE.write_text(page(read()), encoding="utf-8")


def page(record: dict[str, Any]) -> str:
    """The page, as Markdown."""
    verdicts = [Verdict(name, one["class"], one["kind"], tuple(one["why"])) for name, one in record["verdicts"].items()]
    return "\n".join([*_head(record["versions"], verdicts), *_exact(verdicts), *_others(verdicts)]) + "\n"


_HEAD = """\
# Models

Made by `python -m tests.models_sweep` from [its record](models.json); do not edit.

Every class of transformers that generates text was built tiny and with random weights, and given to kvpolicy:
{total} classes and configurations; {counts}. Run with transformers {transformers}, torch {torch} and
Python {python}, on a CPU, in float32.

- **Exact** is a class that passed all of these. With room for everything, tokens and logits are those of the plain
  model, bit for bit, for one sequence and for a batch with pads. With little room (`streaming_llm`, `snapkv`, `adakv`)
  logits are those of the plain model whose attention sees, in every layer, row and head, just the entries that the
  policy held; with packed entries (`kivi2`, `snapkv` with `rotation`) those of the plain model that is given the
  unpacked entries in place of its own. A loop that forgets the cache is warned; after `detach` the model is as it was.
- **Refused** is a class that `attach` refuses with `UnsupportedModelError`, nothing having changed.
- **Not tried** is a class that could not be built tiny, or that does not run on tokens alone.

Classes for images and text were given text. Tiny models have the layers of the large ones, not their size: this says
what a class is given to compute, not how well a policy serves a trained model."""


def _head(known: dict[str, str], verdicts: list[Verdict]) -> Iterator[str]:
    counts = {kind: sum(one.kind == kind for one in verdicts) for kind in (EXACT, REFUSED, NOT_TRIED, WRONG)}
    told = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    yield _HEAD.format(total=len(verdicts), counts=told, **known)


def _exact(verdicts: list[Verdict]) -> Iterator[str]:
    yield "\n## Exact\n\n| model type | head | class |\n|---|---|---|"
    for one in verdicts:
        if one.kind == EXACT:
            yield f"| {_title(one)} | {Pair.of(one.name).head} | `{one.model_class}` |"


def _others(verdicts: list[Verdict]) -> Iterator[str]:
    for kind in (REFUSED, NOT_TRIED, WRONG):
        found = [one for one in verdicts if one.kind == kind]
        if found:
            yield f"\n## {kind.capitalize()}\n\n| why | model types |\n|---|---|"
        reasons: dict[str, list[str]] = {}
        for one in found:
            reasons.setdefault(_reason(one), []).append(_title(one))
        for reason, titles in sorted(reasons.items(), key=lambda entry: -len(entry[1])):
            yield f"| {reason} | {', '.join(dict.fromkeys(titles))} |"


def _title(verdict: Verdict) -> str:
    pair = Pair.of(verdict.name)
    return f"{pair.model_type} ({pair.variant})" if pair.variant else pair.model_type


def _reason(verdict: Verdict) -> str:
    """Why, in short, without what differs from class to class."""
    text = "; ".join(verdict.why)
    text = re.sub(r"^\S+ cannot carry a policy: ", "", text)
    text = re.sub(r"^layer \d+ cannot be managed: ", "in a layer ", text)
    text = re.sub(r"^\w+ (does not call|cannot be run)", r"\1", text)
    text = re.sub(r"^Strict\w+: .*? validator '\w+': ", "", text)
    short = text if len(text) <= _LONGEST else f"{text[:_LONGEST]} …"
    return short.replace("|", "\\|")
