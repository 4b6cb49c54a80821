"""All that decides a training run: the stages of the curriculum and the optimizer's numbers."""

from typing import Final

from attrs import field, frozen


@frozen
class Stage:
    """One stretch of the run: rows of ``length`` tokens, until ``until`` of the time is spent.

    ``mixture`` names the task of each row of the batch; its shape stays fixed: new shapes cost time.
    """

    until: float
    length: int
    mixture: tuple[str, ...]


def rows(copying: int, recall: int, tracking: int, reasoning: int) -> tuple[str, ...]:
    """Return a batch's mixture: that many rows of each task."""
    counts = {"copying": copying, "recall": recall, "tracking": tracking, "reasoning": reasoning}
    return tuple(task for task, count in counts.items() for _ in range(count))


STAGES: Final = (
    Stage(0.08, 64, rows(8, 4, 4, 0)),
    Stage(0.18, 128, rows(4, 3, 3, 6)),
    Stage(0.23, 256, rows(2, 3, 3, 8)),
    Stage(0.38, 512, rows(1, 1, 2, 4)),
    Stage(0.60, 1024, rows(0, 1, 2, 3)),
    Stage(0.68, 256, rows(1, 2, 3, 10)),
    Stage(0.88, 1024, rows(0, 1, 2, 3)),
    Stage(1.0, 1536, rows(0, 1, 1, 2)),
)


@frozen
class Settings:
    """Numbers of one run. ``decay_from`` is the share of the time after which the learning rate falls to zero."""

    seed: int = 20
    learning_rate: float = 1e-3
    warm_up_steps: int = 200
    decay_from: float = 0.6
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.02
    clip_norm: float = 1.0
    threads: int = 2
    stages: tuple[Stage, ...] = field(default=STAGES)

    def stage(self, progress: float) -> Stage:
        """Return the stage in force when ``progress`` (0 to 1) of the time is spent."""
        return next((stage for stage in self.stages if progress < stage.until), self.stages[-1])

    def rate(self, step: int, progress: float) -> float:
        """Return the learning rate of ``step``."""
        warmed = min(1.0, (step + 1) / self.warm_up_steps)
        remaining = min(1.0, (1.0 - progress) / (1.0 - self.decay_from))
        return self.learning_rate * warmed * max(0.0, remaining)
