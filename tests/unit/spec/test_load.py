"""A path is that file; a name is a file here, else an installed policy."""

import os
from pathlib import Path

import pytest

from kvpolicy.errors import InputError, KVPolicyError, PolicyError, UnknownPolicyError
from kvpolicy.spec.load import read_policy
from kvpolicy.stages.registry.plugins import registry

TEXT = "kvpolicy: 1\nbudget: 77\nscore: [recency]\n"


@pytest.fixture(autouse=True)
def empty_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_name_finds_the_installed_policy_and_tells_its_file():
    spec, origin = read_policy("rkv")

    assert spec.name == "rkv"
    assert Path(origin) == registry().policies()["rkv"]


@pytest.mark.parametrize("suffix", [".yaml", ".yml"])
def test_file_in_the_working_directory_goes_before_the_installed_policy(empty_working_directory, suffix):
    (empty_working_directory / f"rkv{suffix}").write_text(TEXT)
    spec, origin = read_policy("rkv")

    assert (spec.budget.tokens, spec.name, origin) == (77, "rkv", f"rkv{suffix}")


FORMS = {"text": str, "path": Path, "relative": lambda path: f"./{path}", "bytes": os.fsencode}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_path_is_that_file_in_any_form(empty_working_directory, form):
    (empty_working_directory / "mine.yaml").write_text(TEXT)
    source = form("mine.yaml")
    if isinstance(source, bytes):
        source = Path(os.fsdecode(source))

    assert read_policy(source)[0].name == "mine"


def test_path_needs_no_suffix(empty_working_directory):
    (empty_working_directory / "policy").write_text(TEXT)

    assert read_policy("./policy")[0].name == read_policy(Path("policy"))[0].name == "policy"


@pytest.mark.parametrize(
    "source", ["rkv.yaml", "./rkv", Path("rkv"), "no/rkv.yaml", "a\0.yaml", "x" * 5000 + ".yaml", "."]
)
def test_path_without_a_file_is_no_name(source):
    with pytest.raises(UnknownPolicyError):
        read_policy(source)


class Elsewhere:
    """A path that is none."""

    def __fspath__(self):
        return 7


def test_what_is_no_path_is_said():
    with pytest.raises(InputError, match="must be given as a path or a name: a Python Elsewhere"):
        read_policy(Elsewhere())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rkvv", "unknown policy 'rkvv'; did you mean 'rkv'? installed: adakv, "),
        ("zzzzzz", "unknown policy 'zzzzzz'; installed: adakv, "),
        ("", "unknown policy ''; installed: adakv, "),
    ],
)
def test_unknown_name_gets_close_ones(name, message):
    with pytest.raises(UnknownPolicyError) as caught:
        read_policy(name)

    assert str(caught.value).startswith(message)


def test_unknown_name_tells_of_broken_plugins(install):
    install("my-kv", "raise RuntimeError('no luck')")

    with pytest.raises(UnknownPolicyError, match=r"not loaded: plugin 'my-kv' \(my-kv 1.0\): RuntimeError: no luck$"):
        read_policy("mine")


def test_name_of_two_distributions_must_be_qualified(install):
    source = "@hookimpl\ndef kvpolicy_policies():\n    return ['fake_load_policies']"
    files = {"fake_load_policies/__init__.py": "", "fake_load_policies/rkv.yaml": TEXT}
    install("my-kv", source, files=files)

    with pytest.raises(UnknownPolicyError, match=r"^unknown policy 'rkv'; write 'kvpolicy:rkv' or 'my-kv:rkv'$"):
        read_policy("rkv")
    assert read_policy("my-kv:rkv")[0].budget.tokens == 77


@pytest.mark.parametrize("source", [None, 5, b"rkv", ["rkv"]])
def test_what_is_no_path_and_no_name_is_refused(source):
    with pytest.raises(InputError, match=r"^a policy must be given as a path or a name: "):
        read_policy(source)


def test_pipe_is_refused_rather_than_waited_for(empty_working_directory):
    os.mkfifo(empty_working_directory / "pipe.yaml")

    with pytest.raises(UnknownPolicyError, match=r"pipe.yaml': is no regular file"):
        read_policy("pipe.yaml")


def test_file_that_cannot_be_read_gives_our_error(empty_working_directory, monkeypatch):
    (empty_working_directory / "mine.yaml").write_text(TEXT)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"^mine.yaml: cannot be read: Permission denied$"):
        read_policy("mine.yaml")


def test_message_names_the_file_as_it_was_given(empty_working_directory):
    (empty_working_directory / "mine.yaml").write_text(TEXT.replace("77", "0"))

    with pytest.raises(PolicyError, match=r"^\./mine.yaml:2:9: budget: |^mine.yaml:2:9: budget: "):
        read_policy("./mine.yaml")


def test_all_errors_are_ours():
    assert issubclass(UnknownPolicyError, KVPolicyError)
    assert issubclass(InputError, KVPolicyError)
