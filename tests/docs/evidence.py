"""Which shipped policies others are better than in the committed evaluations; run as a module it writes the file."""

import json
from pathlib import Path

from kvpolicy.evaluate.harness.record import read_record
from kvpolicy.evaluate.report.dominated import dominated

ROOT = Path(__file__).parents[2]
EVIDENCE = ROOT / "policies" / "kvpolicy_policies" / "evidence.json"
SHIPPED = {path.stem for path in EVIDENCE.parent.glob("*.yaml")}
MODELS = ("smollm2", "gemma3-270m", "testbed")


def evidence():
    """By model and shipped policy, another shipped policy that is better."""
    records = {name: read_record(ROOT / f"docs/reference/evaluation/{name}/cells.jsonl") for name in MODELS}
    return {name: dict(dominated(record, among=SHIPPED)) for name, record in records.items()}


if __name__ == "__main__":
    EVIDENCE.write_text(json.dumps(evidence(), indent=2) + "\n", "utf-8")
