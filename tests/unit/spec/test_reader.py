"""Text becomes items with places; what no policy needs is refused where it stands."""

import pytest

from kvpolicy.errors import PolicyError
from kvpolicy.spec.reader import read
from kvpolicy.spec.tree import Problems, SourcePosition

TEXT = """\
a: 1
b:
  - {c: x, "d": '2'}
  - |
    long
    text
"""


def test_values_keep_their_places():
    root = read(TEXT, "p.yaml", Problems())
    first = root.value["b"].value[0]

    assert root.plain == {"a": 1, "b": ({"c": "x", "d": "2"}, "long\ntext\n")}
    assert root.position == SourcePosition("p.yaml", 1, 1)
    assert first.position == SourcePosition("p.yaml", 3, 5)
    assert first.keys == {"c": SourcePosition("p.yaml", 3, 6), "d": SourcePosition("p.yaml", 3, 12)}
    assert first.value["d"].position == SourcePosition("p.yaml", 3, 17)


def test_quotes_make_text_of_anything():
    assert read("['1', \"true\", 1, true]", "p", Problems()).plain == ("1", "true", 1, True)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a: 1\nb: \xff", r"p:2:4: must be UTF-8: byte 0xff"),
        (b"\xff", r"p:1:1: must be UTF-8: byte 0xff"),
        ("a: 1\nb: \x01", "p:2:4: must be text: character 0x0001"),
        ("x" * 65537, "p:1:1: must be at most 64 KiB"),
        ("é" * 32769, "p:1:1: must be at most 64 KiB"),
        ("\ud800", "p:1:1: must be text: character 0xd800"),
        ("%YAML 1." + "1" * 5000 + "\n---\na", "p:1:1: must be YAML: a number in it is out of range"),
        ('a: "\\UFFFFFFFF"', "p:1:1: must be YAML: a number in it is out of range"),
        ("[" + "1," * 2050 + "]", "must be a policy: too many values"),
    ],
)
def test_what_is_no_policy_is_refused(data, message):
    with pytest.raises(PolicyError) as caught:
        read(data, "p", Problems())

    assert message in str(caught.value)


def test_nesting_stops_at_sixteen():
    assert read("[" * 16 + "]" * 16, "p", Problems()).plain != ()
    with pytest.raises(PolicyError, match="nested at most 16 deep"):
        read("[" * 17 + "]" * 17, "p", Problems())
