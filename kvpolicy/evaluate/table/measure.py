"""Accuracy, attention error and bytes of fitted policies, all on the same items and cached tensors."""

from collections.abc import Callable, Iterator, Sequence
from statistics import mean

import attrs
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from kvpolicy.evaluate.calibrations import Calibrations
from kvpolicy.evaluate.table.accuracy import Answered, answered
from kvpolicy.evaluate.table.error import (
    AttentionError,
    Reference,
    attention_error,
    filled,
    reference_of,
    tokens_of,
)
from kvpolicy.evaluate.table.setup import TableSetup
from kvpolicy.evaluate.table.storage import Storage, storage_of
from kvpolicy.evaluate.table.trace import Batch, batch_of, catch
from kvpolicy.evaluate.testbed import make_item
from kvpolicy.plan.plan import Plan
from kvpolicy.policy import Policy

Progress = Callable[[str], None]


@attrs.frozen
class Measured:
    """What one fitted policy gave, by task."""

    answers: dict[str, tuple[Answered, ...]]  # by batch
    errors: dict[str, AttentionError]
    storage: Storage  # after the longest prompt

    @property
    def mean_error(self) -> float:
        """Of the tasks, each the mean over layers."""
        return mean(one.mean for one in self.errors.values())

    @property
    def worst_error(self) -> float:
        """Of any task, that of the layer with the largest."""
        return max(one.worst for one in self.errors.values())

    def whole(self, task: str) -> int:
        """Answers of which every word is right."""
        return sum(sum(one.whole) for one in self.answers[task])

    def before_mistake(self, task: str) -> float:
        """Mean share of an answer's words before the first wrong one."""
        return mean(share for one in self.answers[task] for share in one.before_mistake)

    @property
    def read(self) -> float:
        """Entries read by a decode step as a share of those held, mean over the tasks."""
        return mean(one.read for one in self.errors.values())


class Bench:
    """The items of a setup, and the plans of policies on the model."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        setup: TableSetup,
        calibrations: Calibrations,
    ) -> None:
        self.model = model
        self.setup = setup
        self.calibrations = calibrations
        self._tokenizer = tokenizer
        self.batches = {task: list(self._batches(task)) for task in setup.tasks}

    @property
    def length(self) -> int:
        """Tokens of the shortest item, question and answer included: no item gets more than its share."""
        return min(batch.tokens for batches in self.batches.values() for batch in batches)

    def steps(self, policies: int) -> int:
        """How many times `progress` will be called."""
        return policies * sum(len(batches) + 1 for batches in self.batches.values())

    def measure(self, policies: Sequence[Policy], progress: Progress) -> dict[str, Measured]:
        """By digest. Every policy is given each batch before the next one is made."""
        plans = {policy.digest: self.calibrations.plan(policy) for policy in policies}
        answers: dict[str, dict[str, tuple[Answered, ...]]] = {digest: {} for digest in plans}
        errors: dict[str, dict[str, AttentionError]] = {digest: {} for digest in plans}
        storages: dict[str, Storage] = {}
        for task, batches in self.batches.items():
            for batch in batches:
                self._answer(task, batch, plans, answers, progress)
            reference = self._reference(task)
            for digest, plan in plans.items():
                layers = filled(plan, reference)
                storage = storage_of(layers)  # before that of a policy that keeps everything grows ahead of its entries
                errors[digest][task] = attention_error(layers, reference)
                storages[digest] = max(storages.get(digest, storage), storage, key=lambda one: one.slots)
                progress(f"{task}, attention of {plan.spec.name}")
        return {digest: Measured(answers[digest], errors[digest], storages[digest]) for digest in plans}

    def _answer(
        self,
        task: str,
        batch: Batch,
        plans: dict[str, Plan],
        answers: dict[str, dict[str, tuple[Answered, ...]]],
        progress: Progress,
    ) -> None:
        traced = catch(self.model, batch.context, batch.valid)
        for digest, plan in plans.items():
            found = answered(self.model, plan, batch, traced)
            answers[digest][task] = (*answers[digest].get(task, ()), found)
            progress(f"{task}, answers under {plan.spec.name}")

    def _batches(self, task: str) -> Iterator[Batch]:
        setup = self.setup
        for start in range(0, setup.items, setup.rows):
            indices = range(start, min(start + setup.rows, setup.items))
            yield batch_of(self._tokenizer, [make_item(task, setup.seed, one, setup.length) for one in indices])

    def _reference(self, task: str) -> Reference:
        """The first items of the task; attention over all of them but the newest tokens is the prompt's."""
        setup = self.setup
        items = [make_item(task, setup.seed, one, setup.length) for one in range(setup.error_items)]
        batch = batch_of(self._tokenizer, items)
        tokens, valid = tokens_of(batch)
        return reference_of(batch, catch(self.model, tokens, valid), valid, setup.error_steps)
