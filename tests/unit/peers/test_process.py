"""A worker answers one request after another; whatever ends it is one line, and the next request starts another."""

import sys
from pathlib import Path

import pytest

from kvpolicy.errors import InputError
from kvpolicy.peers import PeerProcess

ECHO = """
import json, os, sys, time
answers = 0
for line in sys.stdin:
    asked = json.loads(line)
    if asked.get("die") == "words":
        raise SystemExit("the last words")
    if asked.get("die") == "silent":
        os._exit(3)
    if asked.get("die") == "late":
        time.sleep(60)
    answers += 1
    print("[]" if asked.get("die") == "list" else json.dumps({"asked": asked, "answers": answers}), flush=True)
"""


@pytest.fixture
def process():
    made = PeerProcess(Path(sys.executable), ("-c", ECHO), {"hello": 1}, 2.0)
    yield made
    made.close()


def test_one_process_answers_all_requests_after_a_greeting(process):
    assert [process.ask({"n": n}) for n in (1, 2)] == [
        {"asked": {"n": 1}, "answers": 2},
        {"asked": {"n": 2}, "answers": 3},
    ]
    assert process.greeted == {"asked": {"hello": 1}, "answers": 1}


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("words", "^peer: the last words$"),
        ("silent", "^peer: its process ended with code 3 and no output$"),
        ("late", "^peer: took more than 2 s$"),
        ("list", "^peer: its answer is no object$"),
    ],
)
def test_a_process_that_fails_is_one_line_and_the_next_request_has_another(process, how, message):
    process.ask({})
    with pytest.raises(InputError, match=message):
        process.ask({"die": how})

    assert process.ask({})["answers"] == 2


def test_a_python_that_is_not_there_is_one_line(tmp_path):
    with pytest.raises(InputError, match=r"^peer: .*No such file"):
        PeerProcess(tmp_path / "nowhere", (), {}, 5.0).ask({})


def test_an_ended_process_may_be_closed_again(process):
    process.ask({})
    process.close()
    process.close()

    assert process.ask({})["answers"] == 2
