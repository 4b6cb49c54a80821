"""What scorers that change the scores of another one have in common."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from kvpolicy.stages import Geometry, Needs, Pass, Prompt, QueryLogits, Sample, Scorer, Site, State, View


class ScorerAround(Scorer):
    """Observes, reads again and is calibrated as the scorer `of` does; `score` is left to be written."""

    of: Scorer

    def needs(self) -> Needs:
        return self.of.needs()

    def slot_state(self) -> tuple[State, ...]:
        return self.of.slot_state()

    def in_any_order(self) -> bool:
        return self.of.in_any_order()

    @property
    def calibrated(self) -> bool:
        return self.of.calibrated

    def probes(self, tokens: Tensor) -> Tensor:
        return self.of.probes(tokens)

    def calibrate(self, samples: Sequence[Sample]) -> list[dict[str, Tensor]]:
        return self.of.calibrate(samples)

    def calibration_of(self, table: Tensor, geometry: Geometry) -> list[dict[str, Tensor]]:
        return self.of.calibration_of(table, geometry)

    def check_calibration(self, site: Site) -> None:
        self.of.check_calibration(site)

    def observe_forward(self, query_logits: QueryLogits, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.of.observe_forward(query_logits, state)

    def observe_chunk(self, query_logits: QueryLogits, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.of.observe_chunk(query_logits, state)

    def passes(self, prompt: Prompt) -> Sequence[Pass]:
        return self.of.passes(prompt)

    def observe_pass(self, query_logits: QueryLogits, state: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        return self.of.observe_pass(query_logits, state)

    def observe(self, view: View) -> Mapping[str, Tensor]:
        return self.of.observe(view)
