"""`python -m tests.models_sweep` tries all classes anew and writes the record and docs/reference/models.md.

Names of pairs (`text:llama`) are tried alone, and replace what the record says of them; `--page` writes the page from
the record as it is.
"""

import sys

from tests.models_sweep import record
from tests.models_sweep.children import examine_apart
from tests.models_sweep.pairs import Pair, all_pairs


def main(arguments: list[str]) -> None:
    """Do what was asked for."""
    if arguments == ["--page"]:
        record.write_page()
        return
    verdicts = []
    for pair in map(Pair.of, arguments) if arguments else all_pairs():
        verdicts.append(verdict := examine_apart(pair))
        sys.stdout.write(f"{verdict.name}: {verdict.kind} {'; '.join(verdict.why)}\n")
        sys.stdout.flush()
    record.write(verdicts, record.read()["verdicts"] if arguments else {})


if __name__ == "__main__":
    main(sys.argv[1:])
