"""One class, tried in every way: refused with nothing changed, or exact."""

import copy
import warnings
import zlib
from collections.abc import Callable, Iterator
from typing import Any

import attrs
import torch
from transformers import PreTrainedModel
from transformers.utils import logging

import kvpolicy
from kvpolicy.errors import UncompressedWarning, UnsupportedModelError
from tests.models_sweep.pairs import Pair
from tests.models_sweep.reference import Batch, as_held, forget_positions, plain_logits, through
from tests.models_sweep.tiny import VOCABULARY, CannotBuildError, build
from tests.support import fingerprint

PROMPT, NEW = 20, 5
CHUNKS = (PROMPT, *[1] * 4, 3, *[1] * 3)
TOLERANCE = 1e-4  # of the largest logit: rounding is a hundredth of it
KEEPING = ("kivi",)  # policies that evict nothing

_CANNOT_RUN = "cannot be run on a few tokens"
_SEEN_IN_NUMBERS = "more than a softmax"  # what a configuration, which has no weights, cannot tell

EXACT, REFUSED, WRONG, NOT_TRIED = "exact", "refused", "wrong", "not tried"


@attrs.frozen
class Verdict:
    """What became of a class: `why` says for what reason it was refused or not tried, or what is wrong."""

    name: str
    model_class: str
    kind: str
    why: tuple[str, ...] = ()
    notes: dict[str, Any] = attrs.field(factory=dict)


def _policies() -> dict[str, kvpolicy.Policy]:
    small = {"budget": 10, "compress": {"every": 3}, "protect": {"sinks": 2, "recent": 4}}
    kivi = {"use": "kivi", "bits": 2, "group": 4, "residual": 4, "batch": 4}
    rotation = {"use": "rotation", "bits": 3, "batch": 1}
    return {
        "streaming_llm": kvpolicy.load("streaming_llm", budget=10, protect={"sinks": 2, "recent": 8}),
        "snapkv": kvpolicy.load("snapkv", **small),
        "adakv": kvpolicy.load("adakv", **small),
        "kivi": kvpolicy.load("kivi2", store=kivi),
        "snapkv+rotation": kvpolicy.load("snapkv", store=rotation, **small),
    }


POLICIES = _policies()  # so small that the prompt is compressed, and later tokens in several rounds
_ROOMY = kvpolicy.load("snapkv", budget=4096)


def examine(pair: Pair) -> Verdict:
    """The verdict on a pair. Changes nothing of this process that a caller could see, apart from what is imported."""
    logging.set_verbosity_error()
    try:
        model = build(pair)
    except CannotBuildError as error:
        return Verdict(pair.name, error.model_class, NOT_TRIED, (_one_line(error),))
    return _Examination(pair, model, copy.deepcopy(model)).verdict()


@attrs.define
class _Examination:
    pair: Pair
    model: PreTrainedModel
    plain: PreTrainedModel
    wrong: list[str] = attrs.field(factory=list)
    notes: dict[str, Any] = attrs.field(factory=dict)
    runs: dict[str, Any] = attrs.field(factory=dict)  # of the plain model, by padding
    everything: Any = None  # logits of the plain model

    def verdict(self) -> Verdict:
        before = self._fingerprints()
        checked = _raised(lambda: _ROOMY.check(self.model.config))
        attached = _raised(lambda: _ROOMY.attach(self.model).detach())
        self.notes["check"] = _told(checked) if checked else "passes"
        self._expect_unchanged(before, "after attach")
        runs = _raised(lambda: self.runs.update(_plain_runs(self.plain)))
        if isinstance(attached, UnsupportedModelError) and not (runs and _CANNOT_RUN in str(attached)):
            if checked is None and _SEEN_IN_NUMBERS not in str(attached):
                self.wrong.append(f"check passes what attach refuses: {_told(attached)}")
            return self._done(REFUSED, (_one_line(attached),))
        if runs is not None:
            return self._done(NOT_TRIED, (f"cannot be run on tokens alone: {_told(runs)}",))
        if attached is not None:
            self.wrong.append(f"attach raises {_told(attached)}")
            return self._done(WRONG)
        if checked is not None:
            self.wrong.append(f"check refuses what attach accepts: {_told(checked)}")
        _plain_runs(self.model)  # a model may note lengths that it has seen
        before = self._fingerprints()
        self._try("room for all", self._with_room)
        self._try("a loop without the cache", self._without_cache)
        self._try("the reference", self._reference)
        for name, policy in POLICIES.items():
            self._try(name, lambda name=name, policy=policy: self._as_held(name, policy))
        _plain_runs(self.model)
        self._expect_unchanged(before, "at the end")
        return self._done(WRONG if self.wrong else EXACT)

    def _done(self, kind: str, why: tuple[str, ...] = ()) -> Verdict:
        if self.wrong:
            kind, why = WRONG, tuple(self.wrong)
        return Verdict(self.pair.name, type(self.model).__name__, kind, why, self.notes)

    def _try(self, what: str, check: Callable[[], Iterator[str]]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                self.wrong += [f"{what}: {found}" for found in check()]
            except Exception as error:  # noqa: BLE001
                self.wrong.append(f"{what}: {_told(error)}")

    def _fingerprints(self) -> tuple[Any, ...]:
        return fingerprint.of_model(self.model), fingerprint.of_library(), _process()

    def _expect_unchanged(self, before: tuple[Any, ...], when: str) -> None:
        after = self._fingerprints()
        for what, one, other in zip(("model", "library", "process"), before, after, strict=True):
            if one != other:
                self.wrong.append(f"{when} the {what} is not as it was{_where(one, other)}")

    def _with_room(self) -> Iterator[str]:
        for padding, plain in self.runs.items():
            with _ROOMY.attach(self.model) as attachment, warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                found = _generate(self.model, padding)
                report = attachment.report()
            if not torch.equal(found.sequences, plain.sequences):
                yield f"{padding}: other tokens than the plain model's"
            pairs = list(zip(found.logits, plain.logits, strict=True))
            if not all(torch.equal(one, other) for one, other in pairs):
                yield f"{padding}: logits off by {max(off(one, other) for one, other in pairs):.2g} of the largest"
            if any(issubclass(warning.category, UncompressedWarning) for warning in caught):
                yield f"{padding}: generate warns that nothing is compressed"
            seen = {layer.seq_len for layer in report.layers}
            if seen != {PROMPT + NEW - 1}:
                yield f"{padding}: the report says that {sorted(seen)} tokens were seen"

    def _without_cache(self) -> Iterator[str]:
        with _ROOMY.attach(self.model), warnings.catch_warnings(record=True) as caught, torch.no_grad():
            warnings.simplefilter("always")
            forget_positions(self.model)
            cache = self.model(_batch("unpadded").tokens, use_cache=True).past_key_values
            self.model(_batch("unpadded").tokens[:, :1], past_key_values=cache, use_cache=True)
        count = sum(issubclass(warning.category, UncompressedWarning) for warning in caught)
        self.notes["warnings without the cache"] = count
        if count != 1:
            yield f"{count} warnings"

    def _reference(self) -> Iterator[str]:
        """The reference must be the model itself when everything is held: else it says nothing."""
        batch = long_batch()
        expected = plain_logits(self.plain, batch, CHUNKS)
        found = as_held(self.plain, batch, CHUNKS, None)
        self.notes["reference"] = error = off(found, expected, batch)
        if not error < TOLERANCE:
            yield f"does not compute what the model computes: off by {error:.2g}"
        self.everything = expected

    def _as_held(self, name: str, policy: kvpolicy.Policy) -> Iterator[str]:
        batch = long_batch()
        with policy.attach(self.model) as attachment:
            logits, record = through(self.model, attachment.cache(), batch, CHUNKS)
            report = attachment.report()
        expected = as_held(self.plain, batch, CHUNKS, record)
        error, effect = off(logits, expected, batch), off(logits, self.everything, batch)
        self.notes[name] = error, effect
        if not error < TOLERANCE:
            yield f"logits off by {error:.2g} of the largest"
        if not effect > 10 * TOLERANCE:
            yield f"nothing of it is seen in the logits: {effect:.2g}"
        if name not in KEEPING and any(layer.held >= layer.seq_len for layer in report.layers):
            yield "nothing was evicted"


def _batch(padding: str) -> Batch:
    rows, pads = (1, (0,)) if padding == "unpadded" else (2, (0, 6))
    tokens = torch.randint(3, VOCABULARY, (rows, PROMPT), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(PROMPT) >= torch.tensor(pads)[:, None]).long()
    return Batch(tokens.where(mask > 0, 0), mask)


def long_batch() -> Batch:
    """Two rows, the second with pads in front, as long as all chunks."""
    length = sum(CHUNKS)
    tokens = torch.randint(3, VOCABULARY, (2, length), generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(length) >= torch.tensor((0, 5))[:, None]).long()
    return Batch(tokens.where(mask > 0, 0), mask)


def _plain_runs(model: PreTrainedModel) -> dict[str, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {padding: _generate(model, padding) for padding in ("unpadded", "padded")}


def _generate(model: PreTrainedModel, padding: str) -> Any:
    batch = _batch(padding)
    given = {"do_sample": False, "return_dict_in_generate": True, "output_logits": True, "max_new_tokens": NEW}
    with torch.no_grad():
        return model.generate(batch.tokens, attention_mask=batch.mask, **given)


def off(one: torch.Tensor, other: torch.Tensor, batch: Batch | None = None) -> float:
    """The largest difference between logits of real tokens, as a share of the largest logit."""
    if batch is not None:
        one, other = one[batch.mask > 0], other[batch.mask > 0]
    return ((one - other).abs().max() / other.abs().max()).item()


def _process() -> dict[str, Any]:
    random = zlib.crc32(bytes(torch.get_rng_state().tolist()))
    return {"dtype": torch.get_default_dtype(), "random": random, "gradients": torch.is_grad_enabled()}


def _raised(act: Callable[[], object]) -> Exception | None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            act()
        except Exception as error:  # noqa: BLE001
            return error
    return None


def _where(one: Any, other: Any) -> str:
    if isinstance(one, dict) and isinstance(other, dict):
        for name in sorted({*one, *other}, key=str):
            if one.get(name) != other.get(name):
                return f" / {name}{_where(one.get(name), other.get(name))}"
    return f": {str(one)[:80]} became {str(other)[:80]}"


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {_one_line(error)}"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
