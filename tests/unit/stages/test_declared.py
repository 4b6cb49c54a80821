"""What a plugin says of itself is asked with care: nonsense becomes a PluginContractError that names it."""

import attrs
import pytest
import torch

from kvpolicy.errors import PluginContractError, PolicyError
from kvpolicy.plan.forward_observers import ATTENTION
from kvpolicy.plan.plan import compile_policy
from kvpolicy.spec.checks import check
from kvpolicy.spec.load import parse_policy
from kvpolicy.spec.tree import Item, Problems, SourcePosition
from kvpolicy.stages import (
    AsIs,
    Codec,
    Column,
    Formats,
    Geometry,
    HeadAllocator,
    Merger,
    Needs,
    Reader,
    Rotary,
    Scorer,
    Selector,
    State,
)
from kvpolicy.stages.checking.declared import MOST_OBSERVED

GEOMETRY, DTYPE = Geometry((0, 1), 4, 2, 8), torch.float32
SPEC = parse_policy("kvpolicy: 1\nbudget: 64\nscore: [recency]\n")


def raising(error):
    def method(*_given):
        raise error

    return method


def giving(value):
    return lambda *_given: value


def plugin(kind, **members):
    body = {"name": "odd", "score": giving(None), "merge": giving(None), "choose": giving(None), **members}
    body |= {"select": giving(None), "allocate": giving(None)}
    return attrs.frozen(type("Odd", (kind,), {"formats": giving(Formats(AsIs(), AsIs())), **body}))()


class MuteError(Exception):
    def __str__(self):
        raise RuntimeError


def form(**parts):
    """A format with other parts than a sound one."""
    found = AsIs(columns={"codes": Column((8,), torch.uint8)}, residual_length=0)
    for name, part in parts.items():
        object.__setattr__(found, name, part)
    return found


class Unsealed(AsIs):
    def packed_length(self, length):
        return length + 1


NEEDS = {
    "negative": (giving(Needs(queries=-1)), f"needs queries=-1, expected 0 to {MOST_OBSERVED}"),
    "huge": (giving(Needs(queries=10**12)), "needs queries=1000000000000, expected"),
    "no integer": (giving(Needs(queries=2.5)), "needs queries=2.5, expected"),
    "true": (giving(Needs(forward_queries=True)), "needs forward_queries=true, expected"),
    "no needs": (giving(7), "needs 7, expected Needs"),
    "nothing": (giving(None), "needs null, expected Needs"),
    "rotation of no kind": (giving(Needs(rotary=1)), "needs rotary=1, expected true or false"),
    "mass of no kind": (giving(Needs(attention="yes")), "needs attention='yes', expected true or false"),
    "projection of no kind": (giving(Needs(output_projection=2)), "needs output_projection=2, expected true or false"),
    "norms of no kind": (giving(Needs(hidden_norms="all")), "needs hidden_norms='all', expected true or false"),
    "norms without passes": (giving(Needs(hidden_norms=True)), "needs hidden_norms=true without passes=true"),
    "passes of no kind": (giving(Needs(passes=3)), "needs passes=3, expected true or false"),
    "raises": (raising(KeyError("x")), "raised in `needs`: KeyError: 'x'"),
    "raises without words": (
        raising(MuteError()),
        "raised in `needs`: MuteError: <MuteError, whose text cannot be read",
    ),
    "ends the process": (raising(SystemExit("bye")), "raised in `needs`: SystemExit: bye"),
    "speaks without end": (raising(ValueError("x" * 10**6)), "raised in `needs`: ValueError: xxx"),
}
STATES = {
    "a list": (giving([State("x")]), "gave a list as `slot_state`, expected a tuple"),
    "no state": (giving((3,)), "gave a list as `slot_state`, expected a tuple"),
    "twice": (giving((State("x"), State("x"))), "declares slot state of the same name twice: x"),
    "no name": (giving((State(3),)), "gave a name in `slot_state` that is no word"),
    "two lines": (giving((State("a\nb"),)), "gave a name in `slot_state` that is no word"),
    "too many": (giving(tuple(State(f"s{n}") for n in range(65))), "expected a tuple of up to 64 State"),
    "no fill": (giving((State("x", "much"),)), "gave a fill in `slot_state` that is no number: 'much'"),
    "NaN": (giving((State("x", float("nan")),)), "gave a fill in `slot_state` that is no number: nan"),
    "raises": (raising(OSError("x")), "raised in `slot_state`: OSError: x"),
}
FORMATS = {
    "nothing": (giving(None), "gave NoneType, expected Formats"),
    "one only": (giving(Formats(AsIs(), None)), "gave null as the format of the values, expected a Format"),
    "no columns": (giving(Formats(form(columns=3), AsIs())), "whose `columns` is 3"),
    "column of none": (giving(Formats(form(columns={"x": 3}), AsIs())), "whose `columns` is a mapping"),
    "endless column": (
        giving(Formats(form(columns={"x": Column((2**13, 2**13), torch.uint8)}), AsIs())),
        "whose `columns` is a mapping",
    ),
    "column of no dtype": (giving(Formats(form(columns={"x": Column((1,), float)}), AsIs())), "whose `columns` is"),
    "unit 0": (giving(Formats(form(group_size=0), AsIs())), "whose `group_size` is 0"),
    "half a step": (
        giving(Formats(form(group_size=4, step=6), AsIs())),
        "whose group_size 4 does not divide step 6 and residual_length 0",
    ),
    "keep -1": (giving(Formats(form(residual_length=-1), AsIs())), "whose `residual_length` is -1"),
    "packs too much": (giving(Formats(Unsealed(), AsIs())), "packs 1 of 0 entries, expected whole groups of 1"),
    "raises": (raising(ZeroDivisionError()), "raised in `formats`: ZeroDivisionError"),
}


def refused(spec, message):
    with pytest.raises(PluginContractError) as caught:
        compile_policy(spec, GEOMETRY, "cpu", torch.float32)
    assert message in str(caught.value)
    assert "'odd'" in str(caught.value)
    assert len(str(caught.value)) < 600


def with_scorer(scorer):
    return attrs.evolve(SPEC, score=(attrs.evolve(SPEC.score[0], scorer=scorer),))


@pytest.mark.parametrize("case", NEEDS)
def test_needs_must_make_sense(case):
    method, message = NEEDS[case]
    refused(with_scorer(plugin(Scorer, needs=method)), message)
    refused(attrs.evolve(SPEC, merge=plugin(Merger, needs=method)), message)
    refused(attrs.evolve(SPEC, select=plugin(Selector, needs=method)), message)
    refused(
        attrs.evolve(SPEC, allocate=attrs.evolve(SPEC.allocate, heads=plugin(HeadAllocator, needs=method))), message
    )


def test_what_a_plugin_needs_is_shown_whatever_its_stage():
    """Queries for a selector, and attention for an allocator; forwards are for those that can observe them."""
    selector = plugin(Selector, needs=giving(Needs(queries=7, rotary=True)))
    spec = attrs.evolve(SPEC, select=selector)
    spec = attrs.evolve(
        spec, allocate=attrs.evolve(spec.allocate, heads=plugin(HeadAllocator, needs=giving(Needs(attention=True))))
    )
    with pytest.raises(PolicyError, match="select: odd needs the rotary embedding"):
        compile_policy(spec, GEOMETRY, "cpu", DTYPE)
    plan = compile_policy(spec, GEOMETRY, "cpu", DTYPE, Rotary(torch.ones(4)))
    assert plan.needs == Needs(queries=7, attention=True, rotary=True)
    assert ATTENTION in plan.columns
    assert plan.footprint.window_bytes
    wanted = giving(Needs(forward_queries=3))
    refused(attrs.evolve(SPEC, select=plugin(Selector, needs=wanted)), "needs forward_queries, which only a scorer or")


def test_passes_must_make_sense():
    """Only a scorer has them, and it must be able to remember what it sees of one."""
    needs = giving(Needs(passes=True))
    refused(with_scorer(plugin(Scorer, needs=needs)), "needs passes=true and declares no slot state")
    refused(attrs.evolve(SPEC, merge=plugin(Merger, needs=needs)), "needs passes=true, which only a scorer can have")
    compile_policy(with_scorer(plugin(Scorer, needs=needs, slot_state=giving((State("x"),)))), GEOMETRY, "cpu", DTYPE)


@pytest.mark.parametrize("case", STATES)
def test_states_must_make_sense(case):
    method, message = STATES[case]
    refused(with_scorer(plugin(Scorer, slot_state=method)), message)
    refused(attrs.evolve(SPEC, merge=plugin(Merger, row_state=method)), message.replace("slot", "row"))


@pytest.mark.parametrize("case", FORMATS)
def test_formats_must_make_sense(case):
    method, message = FORMATS[case]
    refused(attrs.evolve(SPEC, store=plugin(Codec, formats=method)), message)


def test_pages_and_flags_must_make_sense():
    refused(
        attrs.evolve(SPEC, read=plugin(Reader, pages=giving(4))), "gave 4 as the format of pages, expected a Format"
    )
    refused(attrs.evolve(SPEC, read=plugin(Reader, pages=raising(IndexError("x")))), "raised in `pages`: IndexError: x")
    refused(with_scorer(plugin(Scorer, in_any_order=giving(1))), "says 1 as `in_any_order`, expected true or false")
    refused(with_scorer(plugin(Scorer, in_any_order=raising(OSError()))), "raised in `in_any_order`: OSError")
    refused(
        attrs.evolve(SPEC, merge=plugin(Merger, votes=property(raising(OSError("x"))))), "raised in `votes`: OSError"
    )
    refused(attrs.evolve(SPEC, store=plugin(Codec, joint=property(giving("yes")))), "says 'yes' as `joint`, expected")


def test_interrupt_passes():
    with pytest.raises(KeyboardInterrupt):
        compile_policy(with_scorer(plugin(Scorer, needs=raising(KeyboardInterrupt()))), GEOMETRY, "cpu", torch.float32)


def test_reading_a_policy_asks_with_the_same_care():
    root = Item({}, SourcePosition("p"))
    for spec in (
        attrs.evolve(SPEC, merge=plugin(Merger, reads_window=True, needs=raising(OSError("x")))),
        attrs.evolve(SPEC, store=plugin(Codec, joint=property(raising(OSError("x"))))),
    ):
        with pytest.raises(PluginContractError, match="OSError: x"):
            check(spec, root, Problems())


@pytest.mark.parametrize("found", [7, None, object()])
def test_tile_that_is_none_is_left_out_with_a_reason(found):
    plan = compile_policy(with_scorer(plugin(Scorer, tile=giving(found))), GEOMETRY, "cpu", torch.float32)

    assert all(term.tile is None for term in plan.fusion.terms)
