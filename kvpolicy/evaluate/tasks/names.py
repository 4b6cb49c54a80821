"""The tasks by name."""

from collections.abc import Sequence

from kvpolicy.errors import EvaluationError, did_you_mean
from kvpolicy.evaluate.tasks.agent_turns import AgentTurns
from kvpolicy.evaluate.tasks.case import Task
from kvpolicy.evaluate.tasks.code import Code
from kvpolicy.evaluate.tasks.continuations import Continuations
from kvpolicy.evaluate.tasks.generated import Generated
from kvpolicy.evaluate.tasks.needles import Needles
from kvpolicy.evaluate.tasks.questions import VerifiedQuestions
from kvpolicy.evaluate.tasks.turns import Turns
from kvpolicy.evaluate.tasks.variables import Variables

TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Continuations(),
        Needles("needle", 1, 1, seen=True, summary="one needle a document; scorers see the question"),
        Needles("needle-unseen", 1, 1, seen=False, summary="one needle a document; scorers do not see the question"),
        Needles("needles", 4, 1, seen=True, summary="one of four needles; scorers see the question"),
        Needles("needles-unseen", 4, 1, seen=False, summary="one of four needles; scorers do not see the question"),
        Needles("needles-two", 4, 2, seen=True, summary="two of four needles at once; scorers see the question"),
        Variables("variables", seen=True, summary="which variables have a value; scorers see the question"),
        Turns(),
        Code(
            "code",
            seen=True,
            summary="tests of functions in a long source file, checked by running these",
        ),
        Code("code-unseen", seen=False, summary="the same; scorers do not see the test"),
        AgentTurns(),
        VerifiedQuestions("gsm8k"),
        Generated("recall", summary="testbed: facts amid filler"),
        Generated("tracking", summary="testbed: chains of assignments"),
        Generated("reasoning", summary="testbed: a long trace over a plan"),
        Generated("recall", seen=False, summary="testbed: the same, scorers do not see the question"),
        Generated("tracking", seen=False, summary="testbed: the same, scorers do not see the question"),
    )
}
GYM = "gym:"
TESTBED_TASKS = ("recall", "recall-unseen", "tracking")
TEXT_TASKS = ("text", "needles", "needles-unseen")


def task_of(name: str) -> Task:
    """The task of that name; `gym:NAME` is a generator of reasoning-gym. Raises EvaluationError."""
    if name.startswith(GYM) and len(name) > len(GYM):
        return VerifiedQuestions(name, name.removeprefix(GYM))
    if name not in TASKS:
        raise EvaluationError(f"task: unknown: {name!r}{did_you_mean(name, TASKS, 'known')}")
    return TASKS[name]


def require_tasks(names: Sequence[str], *, testbed: bool) -> None:
    """Raise EvaluationError for tasks that are unknown, or made for other models."""
    for name in names:
        if isinstance(task_of(name), Generated) != testbed:
            only = "the embedded model" if not testbed else "models that read text"
            raise EvaluationError(f"task: {name} is for {only}")
