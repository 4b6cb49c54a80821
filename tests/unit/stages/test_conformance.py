"""The conformance suite finds what is wrong with a plugin, and says so."""

import attrs
import pytest
import torch

from kvpolicy.errors import ParameterError, PluginContractError
from kvpolicy.stages import (
    AsIs,
    Codec,
    Column,
    Entries,
    Format,
    Formats,
    LayerAllocator,
    Merger,
    Needs,
    Reader,
    Scorer,
    Selector,
    State,
)
from kvpolicy.stages.checks import check_scores
from kvpolicy.stages.conformance import Promises, check_plugin, conformance_cases
from kvpolicy.stages.slots import gather
from tests.views import view_of


def broken(score, needs=Needs(), **members):  # noqa: B008
    """A scorer whose `score` is the function given."""
    body = {
        "name": "broken",
        "score": lambda self, view: score(view),
        "needs": lambda self: needs,
        "__module__": __name__,
        **members,
    }
    return attrs.frozen(type("Broken", (Scorer,), body))()


def norms(view):
    return view.keys.norm(dim=-1)


def writing(view):
    view.keys.mul_(2)
    return norms(view)


SCORERS = {
    "returned shape (3, 2, 22), expected (batch=3, kv_heads=2, seq=23)": lambda view: norms(view)[..., 1:],
    "returned torch.float64, expected torch.float32": lambda view: norms(view).double(),
    "returned list, expected a tensor": lambda view: norms(view).tolist(),
    "scores that are not finite for zero keys": lambda view: view.keys.sum(-1) / norms(view),
    "changed its input 'keys'": writing,
    "the second time": lambda view: torch.rand(view.positions.shape),
    "for the rows": lambda view: norms(view) - norms(view).mean(),
    "with other empty slots": lambda view: norms(view) - norms(view).mean(-1, keepdim=True),
    "for heads swapped": lambda view: norms(view) + torch.arange(norms(view).shape[1])[:, None],
    "raised KeyError: 'mine'": lambda view: view.slot_state["mine"],
}


@pytest.mark.parametrize(("message", "score"), SCORERS.items(), ids=SCORERS)
def test_a_broken_scorer_is_found_out(message, score):
    with pytest.raises(PluginContractError) as caught:
        check_plugin(broken(score))
    assert message in str(caught.value)
    assert "scorer 'broken'" in str(caught.value)


def test_state_must_be_declared_and_shaped():
    observed = {"observe": lambda self, view: {"mine": torch.zeros(1)}}
    with pytest.raises(PluginContractError, match=r"observed \['mine'\], expected only \[\]"):
        check_plugin(broken(lambda view: norms(view).float(), **observed))
    declared = {**observed, "slot_state": lambda self: (State("mine"),)}
    with pytest.raises(PluginContractError, match=r"returned shape \(1,\), expected \(batch=3"):
        check_plugin(broken(lambda view: norms(view).float(), **declared))


def test_scores_that_mix_heads_alike_are_no_fault():
    check = dict(conformance_cases(broken(SCORERS["for heads swapped"]), Promises(heads_apart=False)))
    check["keeps heads apart"]()


@attrs.define
class Loose(Scorer):
    name = "loose"

    def score(self, view):
        return norms(view)


def test_a_plugin_must_be_frozen():
    with pytest.raises(PluginContractError, match="expected an instance that never changes"):
        dict(conformance_cases(Loose()))["is frozen"]()
    with pytest.raises(PluginContractError, match=r"must be decorated with @attrs.frozen"):
        dict(conformance_cases(Loose()))["can be named in a policy"]()


@attrs.frozen
class Spendthrift(LayerAllocator):
    name = "spendthrift"

    def allocate(self, request):
        return (request.length,) * request.layers


@attrs.frozen
class Newest(Selector):
    name = "newest"

    def select(self, scores, candidates, counts):
        back = candidates.flip(-1).cumsum(-1).flip(-1)
        return candidates & (back <= counts[..., None])


@attrs.frozen
class Doubling(Merger):
    name = "doubling"

    def merge(self, view, kept):
        slots = kept.clamp(min=0)[..., None].expand(*kept.shape, view.keys.shape[-1])
        return Entries(2 * view.keys.gather(2, slots), view.values.gather(2, slots))


def gathered(view, kept, **parts):
    """What `drop` returns, with other parts."""
    return Entries(**{"keys": gather(view.keys, kept), "values": gather(view.values, kept), **parts})


def broken_merger(merge, **members):
    """A merger whose `merge` is the function given."""
    states = {"slot_state": lambda self: (State("mine"),), "row_state": lambda self: (State("ours"),)}
    body = {"name": "broken", "merge": lambda self, view, kept: merge(view, kept), "__module__": __name__}
    return attrs.frozen(type("BrokenMerger", (Merger,), {**states, **body, **members}))()


def averaged(view, kept, **parts):
    """The mean over all slots, in place of every kept entry."""
    keys = view.keys.mean(2, keepdim=True).expand(*kept.shape, -1).contiguous()
    return gathered(view, kept, keys=keys, **parts)


def writing_back(view, kept):
    view.keys.mul_(2)
    return gathered(view, kept)


def zeros_of(kept, **options):
    return torch.zeros(kept.shape, **options)


VOTING = {"votes": True}
FOLLOWING = {"needs": lambda self: Needs(followed=2)}
MERGERS = {
    "returned shape (3, 2, 0, 16), expected (batch=3, kv_heads=2, kept=": (
        lambda view, kept: gathered(view, kept[..., :0]),
        {},
    ),
    "returned torch.float32, expected torch.bfloat16": (
        lambda view, kept: gathered(view, kept, values=gathered(view, kept).values.float()),
        {},
    ),
    "returned entries that are not finite": (
        lambda view, kept: averaged(view, kept, values=view.values[:, :, : kept.shape[-1]] / 0),
        {},
    ),
    "returned NoneType, expected a tensor": (gathered, VOTING),
    "returned log-votes, expected `votes` to say so": (
        lambda view, kept: gathered(view, kept, log_votes=zeros_of(kept)),
        {},
    ),
    "returned log-votes that are not finite": (
        lambda view, kept: gathered(view, kept, log_votes=zeros_of(kept).log()),
        VOTING,
    ),
    "for votes of kept slots": (lambda view, kept: gathered(view, kept, log_votes=zeros_of(kept)), VOTING),
    "returned torch.int64, expected torch.bool": (lambda view, kept: gathered(view, kept, changed=kept), {}),
    "returned other keys than those of kept slots, without `changed`": (
        lambda view, kept: averaged(view, kept, changed=zeros_of(kept, dtype=torch.bool)),
        {},
    ),
    "returned slot state ['theirs'], expected only ['mine']": (
        lambda view, kept: gathered(view, kept, slot_state={"theirs": zeros_of(kept)}),
        {},
    ),
    "returned row state ['mine'], expected only ['ours']": (
        lambda view, kept: gathered(view, kept, row_state={"mine": torch.zeros(len(kept))}),
        {},
    ),
    "returned shape (1,), expected (batch=3": (
        lambda view, kept: gathered(view, kept, row_state={"ours": torch.zeros(1)}),
        {},
    ),
    "returned state that are not finite": (
        lambda view, kept: gathered(view, kept, slot_state={"mine": zeros_of(kept) / 0}),
        {},
    ),
    "for row 0 alone": (
        lambda view, kept: gathered(view, kept, row_state={"ours": kept.sum().float().expand(len(kept)).clone()}),
        {},
    ),
    "with other empty slots": (lambda view, kept: averaged(view, kept, changed=kept >= 0), {}),
    "gave other entries the second time": (
        lambda view, kept: gathered(view, kept, slot_state={"mine": torch.rand(kept.shape)}),
        {},
    ),
    "changed its input 'keys'": (writing_back, {}),
    "returned log_votes in the memory of its input": (
        lambda view, kept: gathered(view, kept, log_votes=view.log_votes[..., : kept.shape[-1]]),
        VOTING,
    ),
    "declares slot state of the same name twice": (
        gathered,
        {"slot_state": lambda self: (State("mine"), State("mine"))},
    ),
    "followed ['theirs'], expected only ['mine']": (
        gathered,
        {**FOLLOWING, "follow": lambda self, glimpse, state: {"theirs": state["mine"]}},
    ),
    "followed with NaN in 'mine'": (
        gathered,
        {**FOLLOWING, "follow": lambda self, glimpse, state: {"mine": state["mine"] * torch.nan}},
    ),
    "changed its input 'mine'": (
        gathered,
        {**FOLLOWING, "follow": lambda self, glimpse, state: {"mine": state["mine"].add_(1)}},
    ),
    "raised ValueError: this view has no queries": (lambda view, kept: gathered(view, kept, keys=view.logits), {}),
}


@pytest.mark.parametrize(("message", "broken"), MERGERS.items(), ids=MERGERS)
def test_a_broken_merger_is_found_out(message, broken):
    merge, members = broken
    with pytest.raises(PluginContractError) as caught:
        check_plugin(broken_merger(merge, **members))
    assert message in str(caught.value)
    assert "merger 'broken'" in str(caught.value)


def test_a_merger_is_shown_what_it_asked_for():
    shown = []

    def look(view, kept):
        shown.append(view)
        return gathered(view, kept, log_votes=gather(view.log_votes, kept))

    members = {
        **VOTING,
        "reads_window": True,
        "needs": lambda self: Needs(attention=True, followed=2),
        "follow": lambda self, glimpse, state: {"mine": glimpse.logits[:, :, 0].exp().sum(2)},
    }
    for _, check in conformance_cases(broken_merger(look, **members))[3:]:  # those of the stage
        check()
    for view in shown:
        assert view.queries is not None
        assert view.attention is not None
        assert view.log_votes is not None
        assert view.row_state["ours"].shape == view.positions.shape[:1]
    assert any(view.slot_state["mine"].any() for view in shown)
    assert any(not view.slot_state["mine"].any() for view in shown)


@attrs.frozen(eq=False)
class Rounded(Format):
    """Numbers to one decimal place, in units of two entries."""

    columns: dict
    dtype: torch.dtype
    unit: int = 2
    step: int = 4

    def encode(self, vectors, positions):
        return {"rounded": vectors.unflatten(2, (vectors.shape[2] // 2, 2)).float().round(decimals=1)}

    def decode(self, columns, positions):
        return columns["rounded"].flatten(2, 3).to(self.dtype)


@attrs.frozen
class Rounding(Codec):
    name = "rounding"

    def formats(self, site):
        columns = {"rounded": Column((2, site.geometry.head_dim), torch.float32)}
        return Formats(self.kind()(columns, site.dtype), AsIs())

    def kind(self):
        return Rounded


def broken_codec(*own, **members):
    """`Rounding` with methods of its `own`, whose formats have other members."""
    body = {"name": "rounding", "kind": lambda self: type("Broken", (Rounded,), members), "__module__": __name__}
    body.update((method.__name__, method) for method in own)
    return attrs.frozen(type("BrokenCodec", (Rounding,), body))()


def encoding(change):
    """A codec that changes what `Rounded` encodes."""

    def encode(self, vectors, positions):
        return {"rounded": change(Rounded.encode(self, vectors, positions)["rounded"])}

    return broken_codec(encode=encode)


def decoding(change):
    """A codec that changes what `Rounded` decodes, from [B, K, n, D] and positions."""

    def decode(self, columns, positions):
        return change(Rounded.decode(self, columns, positions), positions)

    return broken_codec(decode=decode)


def doubled_in_place(self, vectors, positions):
    return Rounded.encode(self, vectors.mul_(2), positions)


def zeroed_in_place(self, columns, positions):
    return Rounded.decode(self, {"rounded": columns["rounded"].zero_()}, positions)


def giving(change):
    """A codec that gives something else than `Rounding` does."""

    def formats(self, site):
        return change(Rounding.formats(self, site))

    return broken_codec(formats)


def calibrate(self, samples):
    return []


def refusing(error):
    """A codec that holds nothing but a head dimension of 64."""

    def formats(self, site):
        if site.geometry.head_dim != 64:
            raise error
        return Rounding.formats(self, site)

    return broken_codec(formats)


def spread(rounded):
    return rounded - rounded.mean(2, keepdim=True)


CODECS = {
    "gave AsIs, expected Formats": giving(lambda formats: formats.values),
    "gave a joint format, expected `joint` to say so": broken_codec(joint=True),
    "refuses a model in words: plugin 'rounding': codec 'rounding' raised ValueError: no": refusing(ValueError("no")),
    "packed 1 of 1 entries after 0, expected ever more whole units of 2": broken_codec(sealed=lambda self, n: n),
    "packed 4 of 0 entries after 0, expected": broken_codec(sealed=lambda self, n: 4),
    "packed 0 of 9 entries after 8, expected": broken_codec(sealed=lambda self, n: 8 if n == 8 else 0),
    "packed 3 of 3 entries after 0, expected": giving(lambda both: Formats(attrs.evolve(both.keys, step=3), AsIs())),
    "encoded to [], expected ['rounded']": broken_codec(encode=lambda self, vectors, positions: {}),
    "returned torch.float64, expected torch.float32": encoding(torch.Tensor.double),
    "(batch=3, kv_heads=2, units=3, rounded[0]=2, rounded[1]=64)": encoding(lambda rounded: rounded[..., 1:]),
    "decoded with an error of 0.0499801, expected at most 0": Rounding(),
    "returned torch.float16, expected torch.float32": decoding(lambda vectors, _: vectors.half()),
    "not finite for zeros": decoding(lambda vectors, _: vectors / vectors.abs().amax(-1, keepdim=True)),
    "for unit 0 alone": encoding(spread),
    "when unit 0 is decoded alone": decoding(lambda vectors, _: vectors.flip(2)),
    "for row 0 alone": encoding(lambda rounded: rounded - rounded.mean(0)),
    "for head 0 beside another one": encoding(lambda rounded: rounded - rounded.mean(1, keepdim=True)),
    "with other empty slots": decoding(lambda vectors, at: vectors + (vectors * (at < 0)[..., None]).amax()),
    "not finite for empty slots": decoding(lambda vectors, at: vectors / (at >= 0)[..., None]),
    "changed its input 'vectors'": broken_codec(encode=doubled_in_place),
    "changed its input 'rounded'": broken_codec(decode=zeroed_in_place),
    "the second time": encoding(lambda rounded: rounded + torch.rand(())),
    "calibrated 0 layers, expected 3": broken_codec(calibrate),
}


@pytest.mark.parametrize(("message", "codec"), CODECS.items(), ids=CODECS)
def test_a_broken_codec_is_found_out(message, codec):
    with pytest.raises(PluginContractError) as caught:
        check_plugin(codec)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("plugin", "message"),
    [
        (Spendthrift(), "layer allocator 'spendthrift' gave 65 entries to all layers, expected 8"),
        (Newest(), "left a candidate that scores higher than one it chose"),
        (Newest(), "chose later entries among equal scores"),
        (Doubling(), "returned other keys than those of the kept slots"),
    ],
)
def test_other_stages(plugin, message):
    with pytest.raises(PluginContractError) as caught:
        check_plugin(plugin)
    assert message in str(caught.value)


def test_an_admitted_error_is_no_fault():
    check_plugin(Rounding(), Promises(error=0.05))


def test_a_refusal_in_words_is_no_fault():
    refused = refusing(ParameterError("group: must divide the head dimension"))
    for name, check in conformance_cases(refused, Promises(error=0.05)):
        if name != "equals its copies":  # a class made here cannot be pickled
            check()


def test_the_check_of_an_attachment_names_the_plugin():
    view = view_of(torch.zeros(1, 8, 511, 4))
    with pytest.raises(PluginContractError) as caught:
        check_scores(Loose(), torch.zeros(1, 8, 512), view)
    expected = "scorer 'loose' returned shape (1, 8, 512), expected (batch=1, kv_heads=8, seq=511)"
    assert str(caught.value).endswith(expected)


# -- readers -----------------------------------------------------------------------------------------------------


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
    unit: int = 8
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
