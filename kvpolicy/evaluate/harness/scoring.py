"""Scores of what was written, of one question or of several turns of a conversation."""

from collections.abc import Sequence

from kvpolicy.evaluate.tasks.case import Answer, Turn


def turns_of(case: Answer) -> list[Answer | Turn]:
    """Its questions in the order in which they are asked."""
    return [case, *case.more]


def scored(case: Answer, texts: Sequence[str]) -> dict[str, float]:
    """By metric, from one text a turn: the mean over the turns, and the last turn's where there are several."""
    turns = zip(turns_of(case), texts, strict=True)
    scores = [{name: score(text) for name, score in turn.scores.items()} for turn, text in turns]
    if not case.more:
        return scores[0]
    means = {name: sum(turn[name] for turn in scores) / len(scores) for name in case.scores}
    return {**means, "last": scores[-1]["correct"]}
