"""The whole evaluation of one model: every contender on every group of cases, each cell as it is measured."""

import copy
from collections.abc import Collection, Iterator
from fractions import Fraction
from typing import Any

import attrs
import torch
from transformers import PreTrainedModel

from kvpolicy.errors import EvaluationError, KVPolicyError
from kvpolicy.evaluate.fitting.fit import fit_calibrated
from kvpolicy.evaluate.harness.calibrations import Calibrations
from kvpolicy.evaluate.harness.costs import costs_of_full, costs_under
from kvpolicy.evaluate.harness.measure import GroupRun
from kvpolicy.evaluate.harness.measured import Measured
from kvpolicy.evaluate.harness.record import Cell
from kvpolicy.evaluate.harness.setup import Contender, EvaluationSetup
from kvpolicy.evaluate.models.text_encoding import positions_of
from kvpolicy.evaluate.peers.client import Peers
from kvpolicy.evaluate.peers.names import Peer
from kvpolicy.evaluate.tasks.case import Case, Continuation, Sources
from kvpolicy.evaluate.tasks.names import task_of
from kvpolicy.integrations.transformers.attachment import Attachment
from kvpolicy.plan.plan import Plan
from kvpolicy.policy import Policy, load

_OTHER_PRECISION = {torch.float32: torch.bfloat16, torch.bfloat16: torch.float32, torch.float16: torch.float32}
Key = tuple[str, int, str, float | None]


@attrs.frozen
class Unit:
    """One group of cases of a task, and the contenders that have to be measured on it."""

    task: str
    group: int
    contenders: tuple[Contender, ...]


class Evaluation:
    """Cases, policies and model of a setup. Fitted policies and the model in another precision are made once."""

    def __init__(
        self,
        model: PreTrainedModel,
        sources: Sources,
        setup: EvaluationSetup,
        calibrations: Calibrations,
        peers: Peers | None = None,
    ) -> None:
        """Makes all cases. Raises EvaluationError when texts, or the positions of the model, are too few for them.

        `peers` measures the peers of the setup.
        """
        self.model = model
        self.setup = setup
        self._sources = sources
        self.calibrations = calibrations
        self._peers = peers
        self._groups: dict[str, tuple[tuple[Case, ...], ...]] = {
            task: task_of(task).groups(sources, setup.sizes) for task in setup.tasks
        }
        self._require_positions()
        self._plans: dict[tuple[str, Contender], Plan | str] = {}
        self._other: PreTrainedModel | None = None

    def _require_positions(self) -> None:
        most = positions_of(self.model.config)
        for task, groups in self._groups.items():
            longest = max(case.tokens for group in groups for case in group)
            if most is not None and longest > most:
                raise EvaluationError(f"{task}: takes {longest} tokens, and the model knows {most} positions")

    def close(self) -> None:
        """End the process of the peers, which another measurement would start again."""
        if self._peers is not None:
            self._peers.close()

    def units(self, done: Collection[Key] = ()) -> list[Unit]:
        """What is left to be measured, in the order in which it is."""
        units = []
        for task, groups in self._groups.items():
            for index in range(len(groups)):
                left = tuple(
                    contender for contender in self._contenders(task) if (task, index, *contender.key) not in done
                )
                if left:
                    units.append(Unit(task, index, left))
        return units

    def _contenders(self, task: str) -> tuple[Contender, ...]:
        floor = self.setup.precision and isinstance(self._groups[task][0][0], Continuation)
        extra = (Contender(other_precision=True),) if floor else ()
        return (*self.setup.contenders[:1], *extra, *self.setup.contenders[1:])

    # -- measuring ---------------------------------------------------------------------------------------------

    def measure(self, unit: Unit) -> Iterator[Cell]:
        """The cells of a unit, each as it is measured. A cell that cannot be measured says why."""
        cases = self._groups[unit.task][unit.group]
        try:
            # Copied before a policy is attached, which the copy would have, too.
            other = self._in_other_precision() if self.setup.precision or self._rounds_prompts else None
            prompt_model = other if self._rounds_prompts else None
            run = GroupRun(self.model, self._sources.tokenizer, cases, self.setup.step, prompt_model)
            full = run.full()
            if self._timed(unit):
                full = attrs.evolve(full, costs=costs_of_full(run))
        except (MemoryError, RuntimeError) as error:
            reason = _out_of_memory(error)
            for contender in unit.contenders:
                yield self._cell(unit, contender, reason)
            return
        for contender in unit.contenders:
            self._plan(unit.task, contender)  # which may attach a policy of its own, to calibrate its store
        with Attachment(load("kvpolicy:full").compile(self.model), self.model) as attachment:
            for contender in unit.contenders:
                yield self._cell(unit, contender, self._measured(unit, contender, run, full, attachment))

    def _measured(
        self, unit: Unit, contender: Contender, run: GroupRun, full: Measured, attachment: Attachment
    ) -> Measured | str:
        """What a contender gave, or why it could not be measured."""
        if contender == Contender():
            return full
        try:
            if contender.other_precision:
                return run.in_precision(self._in_other_precision())
            if contender.peer is not None:
                return self._of_peer(contender.peer, contender.share, run)
            plan = self._plan(unit.task, contender)
            return plan if isinstance(plan, str) else self._under(plan, run, attachment, timed=self._timed(unit))
        except KVPolicyError as error:
            return str(error)
        except (MemoryError, RuntimeError) as error:
            return _out_of_memory(error)

    def _timed(self, unit: Unit) -> bool:
        """Whether forwards of their own are timed, beside what is measured."""
        first = (unit.task, unit.group) == (self.setup.tasks[0], 0)
        return bool(self.setup.peers) or (self.setup.times and first)

    def _under(self, plan: Plan, run: GroupRun, attachment: Attachment, *, timed: bool) -> Measured:
        measured = run.under(plan, attachment)
        if not timed:
            return measured
        return attrs.evolve(measured, costs=costs_under(run, plan, attachment, measured))

    def _of_peer(self, peer: Peer, share: Fraction | None, run: GroupRun) -> Measured:
        if self._peers is None:
            raise EvaluationError("nothing runs peers here")
        return self._peers.measured(peer, share, run)

    def _plan(self, task: str, contender: Contender) -> Plan | str:
        """The policy fitted to its share of the task's shortest case, or why that cannot be done."""
        if (task, contender) not in self._plans:
            self._plans[task, contender] = self._fitted(task, contender)
        return self._plans[task, contender]

    def _fitted(self, task: str, contender: Contender) -> Plan | str:
        length = min(case.tokens for group in self._groups[task] for case in group)
        policy, calibrations = contender.policy, self.calibrations
        if policy is None:
            return ""
        try:
            share = Fraction(1) if contender.share is None else contender.share
            fitted = fit_calibrated(policy, self.model, share=share, length=length, calibrate=calibrations.of)
            return fitted.compile(self.model, calibration=calibrations.of(fitted))
        except KVPolicyError as error:  # a policy that does not go with the model must not cost all the others
            return str(error)
        except (MemoryError, RuntimeError) as error:
            return _out_of_memory(error)

    def _cell(self, unit: Unit, contender: Contender, measured: Measured | str) -> Cell:
        plan = self._plans.get((unit.task, contender))
        fitted = Policy(plan.spec) if isinstance(plan, Plan) else None
        cell = Cell(
            task=unit.task,
            group=unit.group,
            policy=contender.name,
            share=contender.key[1],
            digest=None if fitted is None else fitted.digest,
            fitted=None if fitted is None else fitted.to_yaml(),
            prompt_tokens=max(len(case.prompt) for case in self._groups[unit.task][unit.group]),
            peer=contender.peer is not None,
        )
        if isinstance(measured, str):
            return attrs.evolve(cell, refusal=measured)
        return attrs.evolve(
            cell,
            values=measured.values,
            held_bytes=measured.held_bytes,
            full_bytes=measured.full_bytes,
            seconds=round(measured.seconds, 3),
            texts=measured.texts,
            costs={} if measured.costs is None else attrs.asdict(measured.costs),
            versions=measured.versions,
        )

    @property
    def _rounds_prompts(self) -> bool:
        return self.setup.prompts_in_float32 and self.model.dtype != torch.float32

    def _in_other_precision(self) -> PreTrainedModel:
        if self._other is None:
            other: Any = copy.deepcopy(self.model)
            self._other = other.to(_OTHER_PRECISION[self.model.dtype])
        return self._other


def _out_of_memory(error: BaseException) -> str:
    """What is recorded when a cell does not fit into memory; any other error goes on."""
    text = str(error)
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in text:
        return "does not fit into memory"
    raise error
