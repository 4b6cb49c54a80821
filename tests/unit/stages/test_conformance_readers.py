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
    body = {"name": "broken", "choose": lambda self, request: choose(request), "__module__": __name__, **members}
    return attrs.frozen(type("Broken", (Reader,), body))()


def newest(request, count=4):
    """The last `count` slots of every head, ascending, -1 behind a head's last one."""
    lengths = (request.positions >= 0).sum(-1, keepdim=True)
    slots = (lengths - count).clamp(min=0) + torch.arange(count)
    return slots.masked_fill(slots >= lengths, -1)


def best_page(request):
    """The page of 8 with the highest minimum, judged without asking whether it is full."""
    start = 8 * request.pages["minimum"].sum(-1, keepdim=True).argmax(2)
    lengths = (request.positions >= 0).sum(-1, keepdim=True)
    return (start.minimum(lengths - 8) + torch.arange(8)).clamp(min=0)


def marking(request):
    request.queries.zero_()
    return newest(request)


def of_the_batch(request):
    return newest(request, count=2 + len(request.positions))


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
    ("returned torch.int32, expected torch.int64", lambda request: newest(request).int(), {}),
    ("returned list, expected a tensor", lambda request: newest(request).tolist(), {}),
    ("returned shape (4, 1, 4), expected (batch=4, kv_heads=2", lambda request: newest(request)[:, :1], {}),
    ("chose empty slots", lambda request: newest(request) + 1, {}),
    ("chose empty slots", lambda request: newest(request) - 100, {}),
    ("not ascending and padded with -1", lambda request: newest(request).flip(-1), {}),
    ("not ascending and padded with -1", lambda request: newest(request)[..., [0, 0, 1]], {}),
    ("chose nothing in 8 heads that have entries", lambda request: torch.full((4, 2, 3), -1), {}),
    ("chose nothing in 8 heads that have entries", lambda request: torch.zeros(4, 2, 0, dtype=torch.int64), {}),
    ("chose other entries for row 0 alone", of_the_batch, {}),
    ("chose other entries the second time", lambda request: newest(request, int(torch.randint(1, 99, ()))), {}),
    ("changed its input 'queries'", marking, {}),
    ("chose other entries when the contents of empty slots differ", best_page, WITH_PAGES),
    ("returned shape (4, 2, 87, 63)", newest, {"pages": lambda self, site: Minimum(1)}),
    ("unknown name 'nowhere'", newest, {"stores": ("nowhere",)}),
    ("raised KeyError: 'mine'", lambda request: request.pages["mine"], {}),
]


@pytest.mark.parametrize(("message", "choose", "members"), READERS)
def test_a_broken_reader_is_found_out(message, choose, members):
    with pytest.raises(PluginContractError) as caught:
        check_plugin(reader(choose, **members))
    assert message in str(caught.value)


@pytest.mark.parametrize("members", [{}, WITH_PAGES, {"stores": ("latent", "plain")}])
@pytest.mark.parametrize("choose", [newest, lambda request: None])
def test_a_reader_that_keeps_its_promises_is_no_fault(choose, members):
    cases = dict(conformance_cases(reader(choose, **members)))
    del cases["equals its copies"]  # a class of no module cannot be pickled
    for check in cases.values():
        check()
