"""Scorers that read prompts again, or see chunks: passes are tokens; what is remembered follows from queries alone."""

from collections.abc import Callable, Iterator, Mapping

import attrs
import torch
from torch import Tensor

from kvpolicy.stages.checking.declared import needs_of, passes_of
from kvpolicy.stages.checking.returned import check_state, contract_error
from kvpolicy.stages.checking.untouched import tensors_of_prompt, tensors_of_query_logits, untouched
from kvpolicy.stages.conformance.observers import expect_declared
from kvpolicy.stages.conformance.promises import Promises
from kvpolicy.stages.conformance.samples import expect_close, pass_logits_of, queries_of, row_of, sample_view
from kvpolicy.stages.contracts import Scorer
from kvpolicy.stages.prompt_passes import Pass, Prompt
from kvpolicy.stages.query_logits import QueryLogits
from kvpolicy.stages.view import View

_PROMPTS = ((1, 0), (2, 0), (37, 0), (37, 11))  # tokens, and how many came before
_SINKS, _RECENT = 2, 3


def gives_passes_as_declared(scorer: Scorer, _promises: Promises) -> None:
    for count, start in _PROMPTS:
        prompt = _prompt(count, start)
        with untouched(scorer, tensors_of_prompt(prompt)):
            passes = passes_of(scorer, prompt)
        if passes and not needs_of(scorer).passes:
            raise contract_error(scorer, "gives passes, expected none: it does not declare them in `needs`")
        again = passes_of(scorer, _prompt(count, start))
        if list(map(_text, passes)) != list(map(_text, again)):
            raise contract_error(scorer, "gave other passes the second time")


def observes_passes_and_chunks_as_declared(scorer: Scorer, _promises: Promises) -> None:
    view = sample_view(scorer)
    for shown in _shown(scorer, view):
        with untouched(scorer, tensors_of_query_logits(shown.logits, view.slot_state)):
            fresh = shown.observe(shown.logits, view.slot_state)
        expect_declared(scorer, f"observed a {shown.what} and returned", fresh, scorer.slot_state())
        check_state(scorer, fresh, view.slot_state)
        for name, state in fresh.items():
            if state[view.valid].isnan().any():
                raise contract_error(scorer, f"observed a {shown.what} and returned NaN in {name!r}")


def observes_the_same_in_parts(scorer: Scorer, _promises: Promises) -> None:
    view = sample_view(scorer)
    for shown in _shown(scorer, view):
        whole, parts = shown.state(shown.logits, view.slot_state), view.slot_state
        for queries in (slice(0, 2), slice(2, 3), slice(3, None)):
            parts = shown.state(queries_of(shown.logits, queries), parts)
        _expect_same(scorer, parts, whole, view.valid, f"for a {shown.what} in parts")


def ignores_pads(scorer: Scorer, _promises: Promises) -> None:
    view = sample_view(scorer)
    for shown in _shown(scorer, view):
        seen = shown.logits
        hidden = torch.full_like(seen.logits[..., :2, :], -torch.inf)
        own = None if seen.own is None else torch.cat([seen.own, hidden[..., 0]], -1)
        norms = seen.hidden_norms
        if norms is not None:
            norms = torch.cat([norms, norms.new_tensor([[0.0, 1e-3]]).expand(norms.shape[0], -1)], 1)
        padded = attrs.evolve(seen, logits=torch.cat([seen.logits, hidden], -2), own=own, hidden_norms=norms)
        after_padded, expected = (shown.state(one, view.slot_state) for one in (padded, seen))
        _expect_same(scorer, after_padded, expected, view.valid, f"with pads behind a {shown.what}")


def keeps_rows_apart(scorer: Scorer, _promises: Promises) -> None:
    view = sample_view(scorer)
    for shown in _shown(scorer, view):
        together = shown.state(shown.logits, view.slot_state)
        for row in range(view.positions.shape[0]):
            at = slice(row, row + 1)
            state = {name: values[at] for name, values in view.slot_state.items()}
            alone = shown.state(row_of(shown.logits, row), state)
            expected = {name: values[at] for name, values in together.items()}
            _expect_same(scorer, alone, expected, view.valid[at], f"for one row of a {shown.what}")


@attrs.frozen(eq=False)
class _Shown:
    """Logits that a scorer is shown, and the method that is called with them."""

    what: str
    observe: Callable[[QueryLogits, Mapping[str, Tensor]], Mapping[str, Tensor]]
    logits: QueryLogits

    def state(self, seen: QueryLogits, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The whole state after some logits have been seen."""
        return {**state, **self.observe(seen, state)}


def _shown(scorer: Scorer, view: View) -> Iterator[_Shown]:
    needs = needs_of(scorer)
    if needs.passes:
        yield _Shown("pass", scorer.observe_pass, pass_logits_of(scorer, view))
    if needs.chunk:
        logits = attrs.evolve(pass_logits_of(scorer, view), own=None, output_norms=None, hidden_norms=None)
        yield _Shown("chunk", scorer.observe_chunk, attrs.evolve(logits, scaling=view.scaling))


def _prompt(count: int, start: int) -> Prompt:
    random = torch.Generator().manual_seed(4)
    protected = torch.zeros(start + count, dtype=torch.bool)
    protected[:_SINKS] = protected[-_RECENT:] = True
    return Prompt(torch.randint(1, 50, (count,), generator=random), protected)


def _text(own_pass: Pass) -> str:
    return f"{own_pass.tokens.tolist()} {own_pass.spans}"


def _expect_same(
    scorer: Scorer, state: Mapping[str, Tensor], expected: Mapping[str, Tensor], valid: Tensor, when: str
) -> None:
    for name, values in state.items():
        expect_close(scorer, values[valid], expected[name][valid], when)


CHECKS = (
    gives_passes_as_declared,
    observes_passes_and_chunks_as_declared,
    observes_the_same_in_parts,
    ignores_pads,
    keeps_rows_apart,
)
