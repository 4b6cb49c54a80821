"""Policies against the full cache on the same items, interleaved within one run."""

import random
from collections.abc import Callable, Iterator, Sequence
from statistics import mean, median

import attrs
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpolicy.evaluate.answers import Answers, answer, total_tokens
from kvpolicy.evaluate.calibrations import Calibrations
from kvpolicy.evaluate.fit import fit
from kvpolicy.evaluate.scoring import before_mistake, is_whole
from kvpolicy.evaluate.setup import Contender, Setup
from kvpolicy.evaluate.testbed import Item, is_correct, make_item
from kvpolicy.policy import Policy

Progress = Callable[[str], None]


@attrs.frozen
class Outcome:
    """How one contender did on one task. Bytes are for one sequence, all layers."""

    contender: Contender
    task: str
    policy: Policy | None  # as it was fitted to the share
    items: int
    whole: int  # answers of which every word is right
    last_word: int  # answers that end in the right word, even where the way there was wrong
    before_mistake: float  # mean share of the answer's words before the first wrong one
    held_bytes: float  # storage of the entries at the end, slack included
    peak_bytes: float  # the most at any time, while a layer is compressed
    window_bytes: float  # queries observed for the scorers, not in `held_bytes`
    full_bytes: float  # what the full cache held at the end, for the same items
    decode_speed: float  # tokens computed per second, after the first of each row, finished rows included
    prompt_speed: float  # prompt tokens per second, compression included

    @property
    def accuracy(self) -> float:
        """The share of answers of which every word is right."""
        return self.whole / self.items

    @property
    def held_share(self) -> float:
        """Bytes held as a share of the full cache's."""
        return self.held_bytes / self.full_bytes


def compare(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setup: Setup, progress: Progress = lambda _: None
) -> tuple[Outcome, ...]:
    """Run every contender of `setup` on every task; `progress` is told what has just been done.

    Contenders take turns on each batch, in an order drawn from the seed, so that a machine that gets slower or faster
    meanwhile does so for all. Raises EvaluationError before anything runs when a share leaves no room.
    """
    calibrations = Calibrations(model)
    planned = [(task, _fitted(tokenizer, setup, task, calibrations)) for task in setup.tasks]
    _warm_up(tokenizer, planned[0][1], calibrations)
    return tuple(
        one for task, fitted in planned for one in _task(tokenizer, setup, task, fitted, calibrations, progress)
    )


def steps(setup: Setup) -> int:
    """How many times `progress` will be called."""
    return len(setup.tasks) * len(setup.contenders) * len(list(_batches(setup, setup.tasks[0])))


_Fitted = dict[Contender, Policy | None]


def _fitted(tokenizer: PreTrainedTokenizerBase, setup: Setup, task: str, calibrations: Calibrations) -> _Fitted:
    """Each contender's policy for the shortest of the task's items, so that no item gets more than the share."""
    items = [item for batch in _batches(setup, task) for item in batch]
    length = min(total_tokens(tokenizer, item, setup.question) for item in items)
    model = calibrations.model
    return {
        one: one.policy and fit(one.policy, model, length=length, share=one.share, calibrations=calibrations)
        for one in setup.contenders
    }


def _batches(setup: Setup, task: str) -> Iterator[Sequence[Item]]:
    for start in range(0, setup.items, setup.rows):
        indices = range(start, min(start + setup.rows, setup.items))
        yield [make_item(task, setup.seed, index, setup.length) for index in indices]


def _warm_up(tokenizer: PreTrainedTokenizerBase, fitted: _Fitted, calibrations: Calibrations) -> None:
    item = attrs.evolve(make_item("recall", 0, 0, 128), new_tokens=2)
    for policy in fitted.values():
        answer(calibrations.model, tokenizer, [item], policy, calibration=calibrations.of(policy))


def _task(
    tokenizer: PreTrainedTokenizerBase,
    setup: Setup,
    task: str,
    fitted: _Fitted,
    calibrations: Calibrations,
    progress: Progress,
) -> Iterator[Outcome]:
    order = random.Random(setup.seed)  # noqa: S311 - the order of a benchmark
    answers: dict[Contender, list[Answers]] = {one: [] for one in fitted}
    batches = list(_batches(setup, task))
    for batch in batches:
        for one in order.sample(list(fitted), len(fitted)):
            policy = fitted[one]
            calibration = calibrations.of(policy)
            answers[one].append(answer(calibrations.model, tokenizer, batch, policy, setup.question, calibration)[0])
            progress(f"{task}, {one.label}")
    items = [item for batch in batches for item in batch]
    full = _per_item([one.held_bytes for one in answers[Contender()]], items)
    for contender, given in answers.items():
        yield _outcome(contender, task, fitted[contender], items, given, full)


def _outcome(
    contender: Contender,
    task: str,
    policy: Policy | None,
    items: Sequence[Item],
    answers: Sequence[Answers],
    full: float,
) -> Outcome:
    texts = [text for one in answers for text in one.texts]
    later = [(one.new_tokens - len(one.texts), one.decode_seconds) for one in answers]
    return Outcome(
        contender=contender,
        task=task,
        policy=policy,
        items=len(items),
        whole=sum(map(is_whole, items, texts)),
        last_word=sum(map(is_correct, items, texts)),
        before_mistake=mean(map(before_mistake, items, texts)),
        held_bytes=_per_item([one.held_bytes for one in answers], items),
        peak_bytes=_per_item([one.peak_bytes for one in answers], items),
        window_bytes=_per_item([one.window_bytes for one in answers], items),
        full_bytes=full,
        decode_speed=median(tokens / seconds for tokens, seconds in later),
        prompt_speed=median(one.prompt_tokens / one.prompt_seconds for one in answers),
    )


def _per_item(counts: Sequence[int], items: Sequence[Item]) -> float:
    return sum(counts) / len(items)
