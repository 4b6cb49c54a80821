"""One group of cases: computed once with the full cache, then measured under one policy after another."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import attrs
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache

from kvpolicy.errors import EvaluationError
from kvpolicy.evaluate.harness.traced_prompts import TracedPrompts, trace_prompts
from kvpolicy.evaluate.tasks.case import Answer, Case, Continuation, Turn
from kvpolicy.integrations.transformers.attachment import Attachment
from kvpolicy.integrations.transformers.cache import PolicyCache
from kvpolicy.plan.plan import Plan
from kvpolicy.policy import load

CacheOf = Callable[[Sequence[int]], Cache]  # a new cache after the prompts of the cases named


@attrs.frozen
class Measured:
    """What one cache gave on the cases of a group. Bytes are of one sequence, in the managed layers."""

    values: dict[str, list[float]]
    seconds: float
    held_bytes: float
    full_bytes: float
    texts: tuple[str, ...] = ()


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
        self._step = step
        distinct = {case.prompt: None for case in cases}
        order = {prompt: row for row, prompt in enumerate(distinct)}
        self._rows = [order[case.prompt] for case in cases]  # of the prompts, by case
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
            return self.prompts.uncompressed([self._rows[case] for case in cases], self.model)

        values, texts = self._run(cache_of)
        full_bytes = self._full_bytes
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
            caches.append(cache.fork([self._rows[case] for case in cases]))
            return caches[-1]

        values, texts = self._run(cache_of)
        held = max(map(_bytes_of_a_row, caches))
        full_bytes = self._full_bytes
        return Measured(values, time.perf_counter() - started, held, full_bytes, texts), caches

    @torch.inference_mode()
    def in_precision(self, model: PreTrainedModel) -> Measured:
        """The same model in another precision with a full cache: how far rounding alone moves the predictions."""
        self._require_reference()
        started = time.perf_counter()
        prompts = self._computed if model is self._prompt_model else None
        other = GroupRun(model, self._tokenizer, self.cases, self._step, prompts=prompts)
        other._reference = self._reference

        def cache_of(cases: Sequence[int]) -> Cache:
            return other.prompts.uncompressed([other._rows[case] for case in cases], model)

        values, texts = other._run(cache_of)
        full_bytes = other._full_bytes
        return Measured(values, time.perf_counter() - started, full_bytes, full_bytes, texts)

    def _require_reference(self) -> None:
        """Raise EvaluationError if there is nothing yet that predictions can be compared with."""
        if isinstance(self.cases[0], Continuation) and not self._reference:
            raise EvaluationError("measure the full cache first: predictions are compared with its own")

    @property
    def _full_bytes(self) -> int:
        """Bytes of a full cache in the managed layers when the longest case is over."""
        return self._full_plan.footprint.full_bytes(max(case.tokens for case in self.cases))

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
                yield {name: score(text) for name, score in case.scores.items()}, text
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
        """Mean values of one case over its turns, those of the last turn, and all that was written."""
        rows, ids = self._prompt_rows(chosen), self.prompts.tokens[self._prompt_rows(chosen)]
        ends = self.model.generation_config.eos_token_id
        ended = set(ends if isinstance(ends, list) else [ends])
        texts: list[str] = []
        scores: list[dict[str, float]] = []
        turns: list[Answer | Turn] = [case, *case.more]
        for turn in turns:
            ids = torch.cat([ids, torch.tensor([turn.question], device=ids.device)], 1)
            written = self._generated(rows, ids, turn.new_tokens, cache)
            texts += self._tokenizer.batch_decode(written[:, ids.shape[1] :], skip_special_tokens=True)
            scores.append({name: score(texts[-1]) for name, score in turn.scores.items()})
            # The next question begins with what ends an answer; the newest token is not in the cache yet.
            ids = written[:, :-1] if int(written[0, -1]) in ended else written
        means = {name: sum(turn[name] for turn in scores) / len(scores) for name in case.scores}
        return {**means, "last": scores[-1]["correct"]}, "\n".join(texts)

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
        for start in range(0, tokens.shape[1] - 1, self._step):
            now = tokens[:, start : min(start + self._step, tokens.shape[1] - 1)]
            lengths = self.prompts.valid[rows].sum(1, keepdim=True)
            places = lengths + start + torch.arange(now.shape[1], device=lengths.device)
            call: Any = {"attention_mask": self._mask(rows, start + now.shape[1]), "position_ids": places}
            logits: Tensor = self.model(now, **call, past_key_values=cache, use_cache=True).logits
            reference = self._reference.setdefault((chosen[0], start), logits)
            following = tokens[:, start + 1 : start + 1 + now.shape[1]]
            parts.append(compared(logits, reference, following))
        yield from _joined(parts)

    def _prompt_rows(self, chosen: Sequence[int]) -> Tensor:
        return torch.tensor([self._rows[case] for case in chosen], device=self.model.device)

    def _mask(self, rows: Tensor, behind: int) -> Tensor:
        return torch.nn.functional.pad(self.prompts.valid[rows].long(), (0, behind), value=1)


@attrs.frozen(eq=False)
class Comparison:
    """Per row and token, [R, t]: KL divergence in nats, whether the likeliest token is the same, log-likelihood."""

    kl: Tensor
    same: Tensor
    likelihood: Tensor


def compared(logits: Tensor, reference: Tensor, following: Tensor) -> Comparison:
    """Logits [R, t, V] against those of the full cache; `following` are the tokens [R, t] that came."""
    ours, full = logits.float().log_softmax(-1), reference.float().log_softmax(-1)
    kl = (full.exp() * (full - ours)).sum(-1).clamp(min=0)
    likelihood = ours.gather(-1, following[..., None]).squeeze(-1)
    return Comparison(kl, logits.argmax(-1) == reference.argmax(-1), likelihood)


def _joined(parts: Sequence[Comparison]) -> Iterator[dict[str, float]]:
    kl, same, likelihood = (
        torch.cat([getattr(part, name) for part in parts], 1) for name in ("kl", "same", "likelihood")
    )
    for row in range(kl.shape[0]):
        differs = (~same[row]).nonzero()
        yield {
            "kl": float(kl[row].mean()),
            "top1": float(same[row].float().mean()),
            "agreed": float(differs[0]) if len(differs) else float(same.shape[1]),
            "nll": -float(likelihood[row].mean()),
        }


def _bytes_of_a_row(cache: PolicyCache) -> float:
    """Bytes of the managed layers of a policy's cache, for one of its rows."""
    cache.count()
    return sum(layer.nbytes for layer in cache.stats) / max(1, cache.rows)
