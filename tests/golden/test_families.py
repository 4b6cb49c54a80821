"""No file of published results goes unread without anyone having decided so."""

from tests.golden.families import FOLDER, NOT_YET, TESTED, family_of


def test_every_file_belongs_to_a_family():
    files = sorted(path.stem for path in FOLDER.glob("*.npz"))
    assert files, f"no published results in {FOLDER}"
    assert [name for name in files if family_of(name) is None] == []


def test_a_family_is_listed_once():
    listed = [*NOT_YET, *(family for tested in TESTED.values() for family in tested)]
    assert len(listed) == len(set(listed))


def test_the_longest_prefix_decides():
    assert family_of("rkv_rounds_gqa") == "rkv_rounds"
    assert family_of("rkv_gqa_b1") == "rkv"
    assert family_of("unheard_of") is None
