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
    assert len(re.findall(r"63 │ +15\.0 │", text)) == 3


def test_before_any_generation_there_is_nothing_to_report():
    with small("snapkv").attach(model()) as attachment:
        assert attachment.report().layers == ()


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (3 * 2**20, "3.0 MiB"), (5 * 2**30, "5.0 GiB")],
)
def test_bytes_are_written_for_people(count, text):
    assert human_bytes(count) == text
