"""Runs cases with a peer's cache: the prompt at once, then a text some tokens at a time, or a greedy answer."""

import copy
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from .caches import Made
from .held import held_bytes


class CaseRun:
    """The cases of one group. One row at a time: peers take no padding.

    What is given: `prompts`, rows of ids; `cases`, each with the number of its `prompt`, and a `text` of ids, or
    `turns` with the ids of a `question` and how many `new_tokens` are written at most; `step`, tokens of a text that
    are computed at once; `stop`, ids that end an answer; `timed`, decode steps that are timed.
    """

    def __init__(self, model: Any, make: Callable[[], Made], cases: dict[str, Any]) -> None:
        self.model = model
        self._make = make
        make()  # whatever that imports is imported before anything is timed
        self._given = cases
        self._stop = set(cases["stop"])

    def measured(self) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
        """Tokens, bytes and seconds as JSON-ready data; and logits [t, V] of every text, by the number of its case."""
        tokens: list[list[list[int]]] = [[] for _ in self._given["cases"]]
        logits: dict[str, torch.Tensor] = {}
        held, ends, prefills, steps = [], [], [], []
        for row, prompt in enumerate(self._given["prompts"]):
            cache, seconds = self._prefilled(prompt)
            held.append(held_bytes(cache))
            prefills.append(seconds)
            for index, case in enumerate(self._given["cases"]):
                if case["prompt"] != row:
                    continue
                own = self._copy(cache, prompt)
                if "turns" in case:
                    tokens[index], seen = self._answers(own, len(prompt), case["turns"])
                else:
                    logits[str(index)] = self._text(own, len(prompt), case["text"])
                    seen = len(prompt) + len(case["text"])
                ends.append((held_bytes(own), seen))
                del own
            steps.append(self._step_seconds(cache, len(prompt)))
        facts = {
            "tokens": tokens,
            "prompt_bytes": max(held),
            "end_bytes": max(ends)[0],
            "end_tokens": max(ends)[1],
            "prefill_seconds": statistics.median(prefills),
            "step_seconds": statistics.median(steps),
        }
        return facts, logits

    def _prefilled(self, prompt: list[int]) -> tuple[Any, float]:
        """The cache after a prompt, and the seconds that took, whatever the peer does about it included."""
        ids = torch.tensor([prompt], device=self.model.device)
        started = self._now()
        cache, within = self._make()
        with within:
            self.model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
        return cache, self._now() - started

    def _copy(self, cache: Any, prompt: list[int]) -> Any:
        """A cache that goes on from where another one is; those of quanto cannot be copied, and are made again."""
        try:
            return copy.deepcopy(cache)
        except RuntimeError:
            return self._prefilled(prompt)[0]

    def _forward(self, cache: Any, ids: list[int], place: int) -> torch.Tensor:
        """Logits [t, V] of tokens whose first stands at `place`, however few entries the cache holds."""
        places = torch.arange(place, place + len(ids), device=self.model.device)[None]
        given = torch.tensor([ids], device=self.model.device)
        found: torch.Tensor = self.model(
            input_ids=given, position_ids=places, past_key_values=cache, use_cache=True
        ).logits
        return found[0]

    def _text(self, cache: Any, place: int, ids: list[int]) -> torch.Tensor:
        step = self._given["step"]
        parts = (self._forward(cache, ids[start : start + step], place + start) for start in range(0, len(ids), step))
        return torch.cat([part.float().cpu() for part in parts])

    def _answers(self, cache: Any, place: int, turns: list[dict[str, Any]]) -> tuple[list[list[int]], int]:
        """What is written in each turn, and how many tokens have gone into the cache in the end.

        The token that is written last has not yet; it goes in with the next question, unless it ended the answer: the
        question begins with what does.
        """
        answers: list[list[int]] = []
        left: list[int] = []
        for turn in turns:
            written: list[int] = []
            ids = left + turn["question"]
            while len(written) < turn["new_tokens"]:
                written.append(int(self._forward(cache, ids, place)[-1].argmax()))
                place += len(ids)
                ids = written[-1:]
                if written[-1] in self._stop:
                    break
            answers.append(written)
            left = [] if written[-1] in self._stop else written[-1:]
        return answers, place

    def _step_seconds(self, cache: Any, place: int) -> float:
        """Median of a decode step right behind the prompt; the cache goes on meanwhile."""
        seconds, ids = [], [0]
        for step in range(self._given["timed"]):
            started = self._now()
            ids = [int(self._forward(cache, ids, place + step)[-1].argmax())]
            seconds.append(self._now() - started)
        return statistics.median(seconds)

    def _now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()
