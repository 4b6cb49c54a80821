"""The conformance suite finds what is wrong with a reader."""

import attrs
import pytest
import torch

from kvpolicy.errors import PluginContractError
from kvpolicy.stages import (
    Column,
    Format,
    Reader,
)
from kvpolicy.stages.conformance import check_plugin, conformance_cases


def reader(choose, **members):
    """A reader whose `choose` is the function given."""
    body = {"name": "broken", "choose": lambda self, question: choose(question), "__module__": __name__, **members}
    return attrs.frozen(type("Broken", (Reader,), body))()


def newest(question, count=4):
    """The last `count` slots of every head, ascending, -1 behind a head's last one."""
    lengths = (question.positions >= 0).sum(-1, keepdim=True)
    slots = (lengths - count).clamp(min=0) + torch.arange(count)
    return slots.masked_fill(slots >= lengths, -1)


def best_page(question):
    """The page of 8 with the highest minimum, judged without asking whether it is full."""
    start = 8 * question.pages["minimum"].sum(-1, keepdim=True).argmax(2)
    lengths = (question.positions >= 0).sum(-1, keepdim=True)
    return (start.minimum(lengths - 8) + torch.arange(8)).clamp(min=0)


def marking(question):
    question.queries.zero_()
    return newest(question)


def of_the_batch(question):
    return newest(question, count=2 + len(question.positions))


@attrs.frozen(eq=False)
class Minimum(Format):
    """The smallest number of each channel of 8 keys; `shift` makes the columns other ones than are declared."""

    shift: int = 0
    group_size: int = 8
    step: int = 8
    columns = {"minimum": Column((64,), torch.float32)}  # noqa: RUF012

    def encode(self, vectors, positions):
        minimum = vectors.unflatten(2, (-1, 8)).amin(3).float()
        return {"minimum": minimum[..., self.shift :]}

    def decode(self, columns, positions):
        raise NotImplementedError


WITH_PAGES = {"pages": lambda self, site: Minimum()}
READERS = [
    ("returned torch.int32, expected torch.int64", lambda question: newest(question).int(), {}),
    ("returned list, expected a tensor", lambda question: newest(question).tolist(), {}),
    ("returned shape (4, 1, 4), expected (batch=4, kv_heads=2", lambda question: newest(question)[:, :1], {}),
    ("chose slots that hold nothing", lambda question: newest(question) + 1, {}),
    ("chose slots that hold nothing", lambda question: newest(question) - 100, {}),
    ("not ascending, with -1 behind", lambda question: newest(question).flip(-1), {}),
    ("not ascending, with -1 behind", lambda question: newest(question)[..., [0, 0, 1]], {}),
    ("chose nothing in 8 heads that hold entries", lambda question: torch.full((4, 2, 3), -1), {}),
    ("chose nothing in 8 heads that hold entries", lambda question: torch.zeros(4, 2, 0, dtype=torch.int64), {}),
    ("chose other entries for row 0 alone", of_the_batch, {}),
    ("chose other entries the second time", lambda question: newest(question, int(torch.randint(1, 99, ()))), {}),
    ("changed its input 'queries'", marking, {}),
    ("chose other entries with other empty slots", best_page, WITH_PAGES),
    ("returned shape (4, 2, 87, 63)", newest, {"pages": lambda self, site: Minimum(1)}),
    ("unknown name 'nowhere'", newest, {"stores": ("nowhere",)}),
    ("raised KeyError: 'mine'", lambda question: question.pages["mine"], {}),
]


@pytest.mark.parametrize(("message", "choose", "members"), READERS)
def test_a_broken_reader_is_found_out(message, choose, members):
    with pytest.raises(PluginContractError) as caught:
        check_plugin(reader(choose, **members))
    assert message in str(caught.value)


@pytest.mark.parametrize("members", [{}, WITH_PAGES, {"stores": ("latent", "plain")}])
@pytest.mark.parametrize("choose", [newest, lambda question: None])
def test_a_reader_that_keeps_its_promises_is_no_fault(choose, members):
    cases = dict(conformance_cases(reader(choose, **members)))
    del cases["equals its copies"]  # a class of no module cannot be pickled
    for check in cases.values():
        check()
