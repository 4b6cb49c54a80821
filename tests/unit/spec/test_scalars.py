"""What a bare word means."""

import pytest

from kvpolicy.spec.scalars import resolve


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("", None), ("~", None), ("null", None), ("true", True), ("false", False),
        ("0", 0), ("-0", 0), ("12", 12), ("+12", 12), ("-12", -12), ("9" * 18, 10**18 - 1),
        ("1e-6", 1e-6), ("1E3", 1e3), ("1.5", 1.5), (".5", 0.5), ("-.5e+2", -50.0), ("1.", 1.0), ("00.5", 0.5),
    ],
)  # fmt: skip
def test_word_has_the_value(text, value):
    found = resolve(text)

    assert (found, type(found)) == (value, type(value))


@pytest.mark.parametrize(
    "text",
    [
        "Null", "NULL", "True", "TRUE", "yes", "no", "on", "off", "y", "n",
        "017", "0o17", "0x1f", "0b1", "1_000", "1:30", "190:20:30", "2001-01-01", "9" * 19, "9" * 60000,
        ".nan", ".inf", "-.inf", "nan", "inf", "1e999", "-1e999", "1e99999999", ".", "e5", ".e5", "1e", "--1", "\u0661",
    ],
)  # fmt: skip
def test_everything_else_is_text(text):
    assert resolve(text) == text
