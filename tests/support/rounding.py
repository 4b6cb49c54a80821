"""What rounding may do: whether two numbers agree up to it, and whether a decision hangs on it."""

from collections.abc import Callable

import attrs
import torch

ROUNDING = 2e-5  # of the largest number of a tensor: what two runs may differ by; five to ten times what they do
PROBES = 32  # decisions under noise; of those that hang on rounding each falls either way, half of the time


@attrs.frozen
class Noise:
    """Draws what rounding might have done."""

    rounding: float  # the largest, as a share
    random: torch.Generator


def close(one, other, rounding=ROUNDING):
    """Whether two tensors agree up to rounding."""
    if one.shape != other.shape:
        return False
    return torch.allclose(one.double(), other.double(), rtol=0, atol=rounding * scale_of(other), equal_nan=True)


def scale_of(tensor):
    """The largest finite magnitude, at least the smallest number that counts."""
    finite = tensor.double()[tensor.isfinite()].abs()
    return max(finite.max().item() if finite.numel() else 0.0, 1e-30)


def noisy(tensor, noise):
    """As rounding might have left it: what is nowhere negative by a share of itself, else of the largest."""
    if tensor is None or not tensor.is_floating_point():
        return tensor
    drawn = noise.rounding * (2 * torch.rand(tensor.shape, generator=noise.random, dtype=torch.float64) - 1)
    scale = tensor.double() if bool((tensor >= 0).all()) else scale_of(tensor)
    return torch.where(tensor.isfinite(), tensor + drawn * scale, tensor).to(tensor.dtype)


def noisy_columns(columns, noise):
    return {name: noisy(column, noise) for name, column in columns.items()}


@attrs.frozen(eq=False)
class Decision:
    """What was decided of one row."""

    exact: torch.Tensor  # positions
    numbers: tuple[torch.Tensor, ...]  # that it was made from; enough of them to tell rows apart
    outcome: dict[str, torch.Tensor]  # in numbers, comparable one by one
    again: Callable | None = None  # given `Noise`, the outcome when the numbers had that noise
    payload: object = None  # what was decided, in the form in which it is needed

    def beside(self, other):
        """Both, as far as they are about the same."""
        return self, other

    def same_question(self, other, rounding=ROUNDING):
        """Whether both were made from the same positions, and numbers that agree up to rounding."""
        if self.exact.shape != other.exact.shape or not torch.equal(self.exact, other.exact):
            return False
        return all(close(*pair, rounding) for pair in zip(self.numbers, other.numbers, strict=True))

    def same_answer(self, other, rounding=ROUNDING):
        """Whether both decided the same, up to rounding."""
        return all(close(number, other.outcome[name], rounding) for name, number in self.outcome.items())

    def under_noise(self, noise):
        """The outcome when the numbers had noise of the size of rounding."""
        return self.again(noise)

    def hangs_on_rounding(self, other, rounding=ROUNDING):
        """Whether each number of both outcomes lies where those of decisions under noise lie."""
        noise = Noise(rounding, torch.Generator().manual_seed(0))
        drawn = [self.under_noise(noise) for _ in range(PROBES)]
        return all(
            _among(number, [one[name] for one in drawn], rounding)
            for outcome in (self.outcome, other.outcome)
            for name, number in outcome.items()
        )


def _among(number, drawn, rounding):
    among = torch.stack(drawn).double()
    slack = rounding * scale_of(number)
    inside = (number >= among.amin(0) - slack) & (number <= among.amax(0) + slack)
    return bool((inside | number.isnan()).all())
