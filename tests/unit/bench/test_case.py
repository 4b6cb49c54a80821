"""What a case says of its samples, and that nothing is lost on the way to a file."""

import json
from pathlib import Path

import attrs
import pytest

from kvpolicy.bench.baselines.contenders import DYNAMIC
from kvpolicy.bench.protocol.case import AGAIN, OURS, Case
from kvpolicy.bench.protocol.result import Result, read_result
from kvpolicy.bench.report.picture import draw
from kvpolicy.bench.report.tables import HEADINGS, human_seconds, markdown, rows_of
from kvpolicy.bench.report.verdict import Verdict
from kvpolicy.errors import InputError

SAMPLES = {OURS: (1.0, 2.0, 4.0), AGAIN: (1.1, 2.0, 3.0), "naive": (3.0, 8.0, 12.0)}
IMAGES = Path(__file__).parents[3] / "docs" / "images"
HERE = {
    "versions": dict.fromkeys(("kvpolicy", "torch", "triton", "transformers", "python"), "1"),
    "machine": {"processor": "P", "threads": 1, "cores": 2},
}


def case(**rest):
    return Case("rkv", 4096, SAMPLES, **{"floors": {"bytes": 0.5, "gemm": 1.0}, "parts": 4, **rest})


def result(tmp_path=None, **parts):
    file = None if tmp_path is None else tmp_path / "compress.json"
    return Result("compress", {"rows": 1}, HERE, dict(parts), file=file, date="2026-01-02")


def test_times_are_per_part_and_ratios_per_round():
    one = case()

    assert one.seconds(OURS) == 0.5
    assert one.seconds("naive") == 2.0
    assert one.tail("naive") == pytest.approx((8 + 0.98 * 4) / 4)
    assert one.ratio("naive") == 3.0
    assert one.noise == pytest.approx(0.1)
    assert one.baselines == ("naive",)


def test_the_higher_floor_counts():
    assert case().of_floor() == 0.5
    assert case().of_floor("naive") == 0.125
    assert case(floors={}).of_floor() is None


def test_without_a_second_timing_the_noise_is_unknown():
    assert Case("x", 1, {OURS: (1.0,)}).noise is None


def test_a_record_read_again_is_the_same(tmp_path):
    written = result(tmp_path)
    written.add("compress", case(facts={"digest": "d"}))
    written.leave_out("full", "evicts nothing")
    written.note("goals", [1])

    found = read_result(tmp_path / "compress.json")

    assert found.parts == written.parts == {"compress": [case(facts={"digest": "d"})]}
    assert found.left_out == [{"what": "full", "why": "evicts nothing"}]
    assert found.facts == {"goals": [1]}
    assert markdown(found) == markdown(written)


@pytest.mark.parametrize("file", sorted(IMAGES.glob("gates-*.json")), ids=lambda file: file.stem)
def test_results_of_the_documentation_can_be_read(file):
    """Of a cache that evicts, which is faster than the plain one, or of one that only packs, which is not on a CPU."""
    found = read_result(file)
    evicts = "decode" in found.parts

    assert (found.parts["decode" if evicts else "packed"][0].ratio(DYNAMIC) > 1) == evicts
    assert all(Verdict.from_dict(gate).value > 0 for gate in found.facts["gates"])


def test_every_addition_is_on_disk_at_once(tmp_path):
    written = result(tmp_path)
    for count in (1, 2):
        written.add("compress", case())
        record = json.loads((tmp_path / "compress.json").read_text())
        assert len(record["parts"]["compress"]) == count
        assert record["parts"]["compress"][0]["samples"][OURS] == [1.0, 2.0, 4.0]
        assert record["parts"]["compress"][0]["times_faster_than"] == {"naive": 3.0}
    assert [path.name for path in tmp_path.iterdir()] == ["compress.json"]


@pytest.mark.parametrize("text", ["", "[]", '{"form": 2, "parts": {}}', '{"form": 1}'])
def test_what_is_no_record_is_refused(tmp_path, text):
    file = tmp_path / "other.json"
    file.write_text(text)
    with pytest.raises(InputError, match=r"other\.json"):
        read_result(file)


def test_a_line_per_variant_the_twice_timed_one_with_its_noise():
    rows = list(rows_of([case(facts={"peak_bytes": {"naive": 2048}})]))

    assert rows == [
        ("rkv", "4096", OURS, "500 ms", "990 ms", "±10.0%", "50%", ""),
        ("rkv", "4096", "naive", "2 s", "2.98 s", "3.00x", "12%", "2.0 KiB"),
    ]
    assert all(len(row) == len(HEADINGS) for row in rows)


@pytest.mark.parametrize(
    ("seconds", "text"), [(2.5, "2.5 s"), (0.0137, "13.7 ms"), (81.2e-6, "81.2 µs"), (3e-9, "3 ns"), (0.0, "0 ns")]
)
def test_seconds_are_written_in_the_unit_that_fits(seconds, text):
    assert human_seconds(seconds) == text


def test_markdown_names_where_what_and_what_not():
    shown = result(compress=[case()])
    shown.leave_out("full", "evicts nothing")
    page = markdown(shown)

    assert "2026-01-02; kvpolicy 1, torch 1" in page
    assert "P, 1 of 2 cores" in page
    assert "| rkv | 4096 | naive | 2 s |" in page
    assert "- full: evicts nothing" in page


def test_picture_is_drawn_when_something_can_be_compared(tmp_path):
    assert draw(result(compress=[case(), case()]), tmp_path / "a.png")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert not draw(result(compress=[Case("x", 1, {OURS: (1.0,)})]), tmp_path / "b.png")
    assert not (tmp_path / "b.png").exists()


def test_cases_without_a_context_are_in_no_picture(tmp_path):
    """A prompt has none, and its axis is logarithmic."""
    prompt = attrs.evolve(case(), length=0)
    assert not draw(result(prompt=[prompt]), tmp_path / "a.png")
    assert draw(result(prompt=[prompt], compress=[case()]), tmp_path / "b.png")
