"""`python -m tests.models_sweep` tries all classes anew and writes the record and docs/reference/models.md.

`--page` writes the page alone, from the record as it is; names of pairs (`text:llama`) print their verdicts.
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
    if not arguments:
        record.write(verdicts)


if __name__ == "__main__":
    main(sys.argv[1:])
