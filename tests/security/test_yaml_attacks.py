"""A policy file is untrusted: whatever is in it, reading ends soon, in our error, and runs nothing."""

import time
import tracemalloc
from pathlib import Path

import pytest

from kvpolicy.errors import PolicyError
from kvpolicy.spec.load import parse_policy
from kvpolicy.spec.tree import MAX_BYTES

OK = "kvpolicy: 1\nbudget: 64\nscore: [recency]\n"
KEPT = {path.stem: path.read_bytes() for path in (Path(__file__).parent / "attacks").glob("*.yaml")}
MADE = {
    "brackets 100,000": "[" * 100_000,
    "brackets 60,000": "[" * 60_000,
    "braces": "{a: " * 15_000,
    "dashes": "- " * 30_000 + "x",
    "indentation": "\n".join(" " * depth + "a:" for depth in range(350)),
    "flat list": "[" + "1," * 30_000 + "1]",
    "one megabyte": OK + "x" * 1_000_000,
    "just too long": OK + "#" * (MAX_BYTES - len(OK) + 1),
    "too long in bytes only": OK + "#" + "é" * 40_000,
    "integer of 60,000 digits": OK.replace("64", "9" * 60_000),
    "sexagesimal of 20,000 parts": OK.replace("64", "1" + ":01" * 20_000),
    "float of 60,000 digits": OK.replace("64", "1." + "0" * 60_000 + "e99999999"),
    "version of 60,000 digits": "%YAML 1." + "1" * 60_000 + "\n---\n" + OK,
    "word of 60,000 letters": OK + "select: " + "a" * 60_000,
    "key of 60,000 letters": OK + '"' + "a" * 60_000 + '": 1',
    "name of 60,000 lines": OK + "name: a\n" + " a\n" * 20_000 + "budget: 1",
    "quoted escapes": OK + 'name: "' + r"\x41" * 15_000 + '"\nbudget: 1',
    "blank lines": OK + "\n" * 60_000 + "budget: 1",
    "many keys": "".join(f"k{number}: 1\n" for number in range(1_000)),
    "many close keys": OK + "".join(f"budge{number}: 1\n" for number in range(900)),
    "many duplicates": OK + "budget: 1\n" * 900,
    "many tag directives": "".join(f"%TAG !e{number}! tag:x\n" for number in range(2_500)) + "---\nkvpolicy: 1\n",
    "many unknown scorers": "kvpolicy: 1\nbudget: 64\nscore:\n" + "- recencyx\n" * 1_900,
    "folded scalar": OK + "name: >\n" + "  a\n\n" * 10_000,
    "comments": OK + "# c\n" * 15_000 + "budget: 1",
    "question marks": "? " * 30_000,
    "long path": "kvpolicy: 1\n" + "".join("  " * depth + "a" * 3_000 + ":\n" for depth in range(14)),
}
ATTACKS = {**KEPT, **MADE}


def plain_work():
    """A fixed amount of Python: about a fortieth of a second on an idle machine."""
    for number in range(200_000):
        len(str(number))


def thread_time(call):
    start = time.thread_time()  # of this thread: other work on the machine does not count, though it slows this down
    call()
    return time.thread_time() - start


def reading(attack):
    """Reads it as something that must fail."""

    def read():
        with pytest.raises(PolicyError):
            parse_policy(ATTACKS[attack], "attack.yaml")

    return read


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_ends_in_our_error_soon(attack):
    """In less than twenty times what plain work takes at the same time, in the best of some tries: half a second."""
    parse_policy(OK)  # so that the registry is filled
    tries = (thread_time(reading(attack)) / max(thread_time(plain_work), 1e-9) for _ in range(5))

    assert any(ratio < 20 for ratio in tries)  # the first one is enough, as a rule


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_takes_little_memory_and_no_message_repeats_it(attack):
    parse_policy(OK)
    tracemalloc.start()
    try:
        with pytest.raises(PolicyError) as caught:
            parse_policy(ATTACKS[attack], "attack.yaml")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()

    assert peak < 64 * 2**20
    assert max(len(str(problem)) for problem in caught.value.problems) < 500


def test_there_are_enough_attacks():
    assert len(ATTACKS) >= 26
    assert len(KEPT) >= 26


def test_file_of_the_longest_allowed_size_loads():
    assert parse_policy(OK + "#" * (MAX_BYTES - len(OK))).budget.tokens == 64
