"""One group of cases: computed once with the full cache, then measured under one policy after another."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.harness.comparison import compared, metrics_of
from kvpolicy.evaluate.harness.measured import Measured
from kvpolicy.evaluate.harness.scoring import scored, turns_of
from kvpolicy.evaluate.harness.traced_prompts import TracedPrompts, trace_prompts
from kvpolicy.evaluate.tasks.case import Answer, Case, Continuation
from kvpolicy.integrations.transformers.attachment import Attachment
from kvpolicy.integrations.transformers.cache import PolicyCache
from kvpolicy.plan.plan import Plan
from kvpolicy.policy import load

CacheOf = Callable[[Sequence[int]], Cache]  # a new cache after the prompts of the cases named


class GroupRun:
    """The cases of a group, whose prompts the model has computed."""

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        cases: Sequence[Case],
        step: int,
        prompt_model: PreTrainedModel | None = None,
        prompts: TracedPrompts | None = None,
    ) -> None:
        """`prompt_model` computes the prompts: the model in another precision, whose results are rounded to its own.

        `prompts` are those of the same cases, if they have been computed.
        """
        self.model = model
        self.cases = cases
        self._tokenizer = tokenizer
        self.step = step
        distinct = {case.prompt: None for case in cases}
        order = {prompt: row for row, prompt in enumerate(distinct)}
        self.rows = [order[case.prompt] for case in cases]  # of the prompts, by case
        self._prompt_model = prompt_model or model
        self._computed = trace_prompts(self._prompt_model, list(distinct)) if prompts is None else prompts
        self.prompts: TracedPrompts = self._computed if prompt_model is None else self._computed.to(model.dtype)
        self._full_plan = load("kvpolicy:full").compile(model)
        self._reference: dict[tuple[int, int], Tensor] = {}  # logits of the full cache, by first case and token

    @torch.inference_mode()
    def full(self) -> Measured:
        """With transformers' own full cache. What follows is compared with it, so it comes first."""
        started = time.perf_counter()
        self._reference = {}

        def cache_of(cases: Sequence[int]) -> Cache:
            return self.prompts.uncompressed([self.rows[case] for case in cases], self.model)

        values, texts = self._run(cache_of)
        full_bytes = self.full_bytes
        return Measured(values, time.perf_counter() - started, full_bytes, full_bytes, texts)

    @torch.inference_mode()
    def under(self, plan: Plan, attachment: Attachment) -> Measured:
        """Under a plan, in a cache of its own, while any policy is attached to the model."""
        return self.caches_under(plan, attachment)[0]

    @torch.inference_mode()
    def caches_under(self, plan: Plan, attachment: Attachment) -> tuple[Measured, list[PolicyCache]]:
        """The same, and the caches as they were left."""
        self._require_reference()
        started = time.perf_counter()
        cache = self.prompts.compressed(plan, attachment)
        caches = []

        def cache_of(cases: Sequence[int]) -> Cache:
            caches.append(cache.fork([self.rows[case] for case in cases]))
            return caches[-1]

        values, texts = self._run(cache_of)
        held = max(map(bytes_of_a_row, caches))
        full_bytes = self.full_bytes
        return Measured(values, time.perf_counter() - started, held, full_bytes, texts), caches

    @torch.inference_mode()
    def in_precision(self, model: PreTrainedModel) -> Measured:
        """The same model in another precision with a full cache: how far rounding alone moves the predictions."""
        self._require_reference()
        started = time.perf_counter()
        prompts = self._computed if model is self._prompt_model else None
        other = GroupRun(model, self._tokenizer, self.cases, self.step, prompts=prompts)
        other._reference = self._reference

        def cache_of(cases: Sequence[int]) -> Cache:
            return other.prompts.uncompressed([other.rows[case] for case in cases], model)

        values, texts = other._run(cache_of)
        full_bytes = other.full_bytes
        return Measured(values, time.perf_counter() - started, full_bytes, full_bytes, texts)

    def _require_reference(self) -> None:
        """Raise EvaluationError if there is nothing yet that predictions can be compared with."""
        if isinstance(self.cases[0], Continuation) and not self._reference:
            raise EvaluationError("measure the full cache first: predictions are compared with its own")

    @property
    def full_bytes(self) -> int:
        """Bytes of a full cache in the managed layers when the longest case is over."""
        return self.full_bytes_of(max(case.tokens for case in self.cases))

    def full_bytes_of(self, tokens: int) -> int:
        """Bytes of a full cache of as many tokens in the managed layers."""
        return self._full_plan.footprint.full_bytes(tokens)

    @property
    def prompt_tokens(self) -> int:
        """Tokens of the longest prompt."""
        return max(len(case.prompt) for case in self.cases)

    # -- what another process computed -------------------------------------------------------------------------

    @property
    def stop(self) -> list[int]:
        """Ids that end an answer."""
        ends: Any = getattr(self.model.generation_config, "eos_token_id", None)
        return [] if ends is None else [ends] if isinstance(ends, int) else list(ends)

    def decoded(self, tokens: Sequence[int]) -> str:
        """An answer as text."""
        texts: list[str] = self._tokenizer.batch_decode([list(tokens)], skip_special_tokens=True)
        return texts[0]

    def compared_with_full(self, index: int, logits: Tensor) -> dict[str, float]:
        """Metrics of a text by its case, from logits [t, V] that were computed elsewhere."""
        self._require_reference()
        case = self.cases[index]
        chosen = next(alike for alike in self._alike() if index in alike)
        starts = sorted(start for first, start in self._reference if first == chosen[0])
        reference = torch.cat([self._reference[chosen[0], start][chosen.index(index)] for start in starts])
        following = torch.tensor([case.text[1:]] if isinstance(case, Continuation) else [[]], device=reference.device)
        return next(metrics_of([compared(logits.to(reference.device)[None], reference[None], following)]))

    # -- what is run -------------------------------------------------------------------------------------------

    def _run(self, cache_of: CacheOf) -> tuple[dict[str, list[float]], tuple[str, ...]]:
        """Values by metric in the order of the cases, and answers."""
        values: dict[int, dict[str, float]] = {}
        texts = [""] * len(self.cases)
        for chosen in self._alike():
            for case, (found, text) in zip(chosen, self._measured(chosen, cache_of(chosen)), strict=True):
                values[case], texts[case] = found, text
        names = values[0]
        by_metric = {name: [values[case][name] for case in range(len(self.cases))] for name in names}
        return by_metric, tuple(texts)

    def _alike(self) -> list[list[int]]:
        """Cases that are computed together: as many tokens come behind the prompt, and no further turns."""
        groups: dict[tuple[int, int | None], list[int]] = {}
        for index, case in enumerate(self.cases):
            alone = index if isinstance(case, Answer) and case.more else None
            groups.setdefault((case.behind, alone), []).append(index)
        return list(groups.values())

    def _measured(self, chosen: Sequence[int], cache: Cache) -> Iterator[tuple[dict[str, float], str]]:
        cases = [self.cases[index] for index in chosen]
        answers = [case for case in cases if isinstance(case, Answer)]
        if answers and answers[0].more:
            yield self._conversation(chosen, answers[0], cache)
            return
        if answers:
            for case, text in zip(answers, self._answers(chosen, answers, cache), strict=True):
                yield scored(case, [text]), text
            return
        texts = [case.text for case in cases if isinstance(case, Continuation)]
        for found in self._predictions(chosen, texts, cache):
            yield found, ""

    def _answers(self, chosen: Sequence[int], cases: Sequence[Answer], cache: Cache) -> list[str]:
        rows = self._prompt_rows(chosen)
        questions = torch.tensor([case.question for case in cases], device=self.model.device)
        ids = torch.cat([self.prompts.tokens[rows], questions], 1)
        written = self._generated(rows, ids, max(case.new_tokens for case in cases), cache)
        # A case that may write less than another one of the group writes no more than it would alone.
        answers = [row[: case.new_tokens] for row, case in zip(written[:, ids.shape[1] :], cases, strict=True)]
        texts: list[str] = self._tokenizer.batch_decode(answers, skip_special_tokens=True)
        return texts

    def _conversation(self, chosen: Sequence[int], case: Answer, cache: Cache) -> tuple[dict[str, float], str]:
        """Values of one case over its turns, and all that was written."""
        rows, ids = self._prompt_rows(chosen), self.prompts.tokens[self._prompt_rows(chosen)]
        texts: list[str] = []
        for turn in turns_of(case):
            ids = torch.cat([ids, torch.tensor([turn.question], device=ids.device)], 1)
            written = self._generated(rows, ids, turn.new_tokens, cache)
            texts += self._tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
            # The next question begins with what ends an answer; the newest token is not in the cache yet.
            ids = written[:, :-1] if int(written[0, -1]) in self.stop else written
        return scored(case, texts), "\n".join(texts)

    def _generated(self, rows: Tensor, ids: Tensor, new_tokens: int, cache: Cache) -> Tensor:
        """Greedily, behind ids [R, t] that begin with the prompts of the rows."""
        generate: Any = self.model.generate
        written: Tensor = generate(
            input_ids=ids,
            attention_mask=self._mask(rows, ids.shape[1] - self.prompts.tokens.shape[1]),
            past_key_values=cache,
            max_new_tokens=new_tokens,
            do_sample=False,
        )
        return written

    def _predictions(
        self, chosen: Sequence[int], texts: Sequence[Sequence[int]], cache: Cache
    ) -> Iterator[dict[str, float]]:
        """The text is computed some tokens at a time, as candidates or a further turn would be."""
        rows = self._prompt_rows(chosen)
        tokens = torch.tensor(texts, device=self.model.device)
        parts = []
        for start in range(0, tokens.shape[1] - 1, self.step):
            now = tokens[:, start : min(start + self.step, tokens.shape[1] - 1)]
            lengths = self.prompts.valid[rows].sum(1, keepdim=True)
            places = lengths + start + torch.arange(now.shape[1], device=lengths.device)
            call: Any = {"attention_mask": self._mask(rows, start + now.shape[1]), "position_ids": places}
            logits: Tensor = self.model(now, **call, past_key_values=cache, use_cache=True).logits
            reference = self._reference.setdefault((chosen[0], start), logits)
            following = tokens[:, start + 1 : start + 1 + now.shape[1]]
            parts.append(compared(logits, reference, following))
        yield from metrics_of(parts)

    def _prompt_rows(self, chosen: Sequence[int]) -> Tensor:
        return torch.tensor([self.rows[case] for case in chosen], device=self.model.device)

    def _mask(self, rows: Tensor, behind: int) -> Tensor:
        return torch.nn.functional.pad(self.prompts.valid[rows].long(), (0, behind), value=1)


def bytes_of_a_row(cache: PolicyCache) -> float:
    """Bytes of the managed layers of a policy's cache, for one of its rows."""
    cache.count()
    return sum(layer.nbytes for layer in cache.stats) / max(1, cache.rows)
