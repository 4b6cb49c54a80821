"""What an attachment reports."""

import json
import re

import pytest

from kvpolicy.cache.stats import LayerStats
from kvpolicy.integrations.transformers.report import Report
from kvpolicy.plan.explain.units import human_bytes
from tests.support.models import generate, model, prompt
from tests.support.policies import small


def test_a_report_is_a_snapshot():
    stats = [LayerStats(3)]
    stats[0].sample(10, 4.0, 100)
    report = Report.of(small("snapkv").compile(model()), stats)
    stats[0].sample(11, 5.0, 80)
    assert (report.layers[0].seq_len, report.layers[0].held, report.layers[0].nbytes) == (10, 4.0, 100)
    assert stats[0].peak_bytes == 100


def test_a_report_tells_what_each_layer_holds():
    with small("snapkv").attach(model()) as attachment:
        generate(model(), *prompt(40))
        report = attachment.report()
    found = json.loads(json.dumps(report.to_dict()))
    assert found["policy"] == "snapkv"
    assert [layer["seq_len"] for layer in found["layers"]] == [63] * 3
    assert [layer["held"] for layer in found["layers"]] == [15.0] * 3
    assert found["bytes_held"] == sum(layer["nbytes"] for layer in found["layers"]) == report.nbytes
    text = str(report)
    assert "policy snapkv" in text
    assert len(re.findall(r"│ +0-2 │ +63 │ +15\.0 │", text)) == 1


@pytest.mark.parametrize("rows", [1, 2])
@pytest.mark.parametrize("architecture", ["llama", "gemma3"])
def test_the_share_is_of_the_cache_that_the_model_has_without_a_policy(architecture, rows):
    """Measured on that cache: all layers, those with a sliding window included, and all rows."""
    one, tokens = model(architecture), prompt(*[40] * rows)[0]
    plain = generate(one, tokens).past_key_values
    kept = [layer.keys.nbytes * 2 if not layer.is_sliding else 0 for layer in plain.layers]
    with small("snapkv").attach(one) as attachment:
        generate(one, tokens)
        report = attachment.report()
    windows = (
        sum(size == 0 for size in kept) * rows * 16 * 2 * 2 * 8 * 4
    )  # rows, window, heads, keys and values, float32
    assert report.full_bytes == sum(kept) + windows
    assert report.to_dict()["share_of_full"] == report.share == report.nbytes / report.full_bytes
    assert f"held, {report.share:.1%} of a full cache" in str(report)


def stats_of(layer, **known):
    return LayerStats(
        layer,
        **{
            "rows": 1,
            "seq_len": 131072,
            "held": 8192.0,
            "entry_bytes": 1023 * 2**20,
            "peak_bytes": 1023 * 2**20,
            **known,
        },
    )


def test_alike_neighbours_share_a_line_and_sums_come_last():
    stats = [stats_of(layer, seconds=0.001) for layer in range(30)]
    stats[7] = stats_of(7, held=100.0, compressions=1234, attended=299.88, decode_steps=3)
    report = Report.of(small("snapkv").compile(model()), stats)
    lines = [[cell.strip() for cell in line.split("│")[1:-1]] for line in str(report).splitlines() if "│" in line]
    assert lines == [
        ["0-6", "131072", "8192.0", "", "7.0 GiB", "7.0 GiB", "0x", "7.0"],
        ["7", "131072", "100.0", "100.0", "1023.0 MiB", "1023.0 MiB", "1234x", "0.0"],
        ["8-29", "131072", "8192.0", "", "22.0 GiB", "22.0 GiB", "0x", "22.0"],
        ["all", "", "", "", "30.0 GiB", "30.0 GiB", "", "29.0"],
    ]
    assert max(len(line.rstrip()) for line in str(report).splitlines()) <= 80


def test_layers_between_which_others_lie_are_counted():
    stats = [stats_of(layer) for layer in (5, 11, 17)]
    assert "│ 5-17 (3) │" in str(Report.of(small("snapkv").compile(model()), stats))


def test_before_any_generation_there_is_nothing_to_report():
    with small("snapkv").attach(model()) as attachment:
        assert attachment.report().layers == ()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**20, "3.0 MiB"), (5 * 2**30, "5.0 GiB")],
)
def test_bytes_are_written_for_people(count, text):
    assert human_bytes(count) == text
