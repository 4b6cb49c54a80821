"""constraints.txt is whole and agrees with itself, and the dry run for other Pythons asks for what users install."""

import importlib.util
import json
import sys
import textwrap
import tomllib
import zipfile
from importlib import metadata

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from tests.support.building import ROOT

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
EXTRAS = PROJECT["project"]["optional-dependencies"]


def module():
    """`.ci/resolve.py`, which is no part of a package."""
    spec = importlib.util.spec_from_file_location("resolve_of_ci", ROOT / ".ci" / "resolve.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


resolve = module()
PINS = resolve.pinned((ROOT / "constraints.txt").read_text("utf-8"))
README = (ROOT / "README.md").read_text("utf-8")


def disagreements(lines, pins):
    """Requirements that their own pin does not satisfy; those without a pin stand with None."""
    wanted = (Requirement(line) for line in lines)
    found = [(str(one), pins.get(canonicalize_name(one.name)), one.specifier) for one in wanted]
    return [(text, pin) for text, pin, allowed in found if pin is None or not allowed.contains(pin, prereleases=True)]


def installed():
    """What distributions of this environment require of each other, where both are pinned."""
    for one in metadata.distributions():
        if PINS.get(canonicalize_name(one.metadata["Name"])) != one.version.partition("+")[0]:
            continue
        for line in one.requires or ():
            wanted = Requirement(line)
            if wanted.marker is None or wanted.marker.evaluate({"extra": ""}):
                yield f"{wanted.name}{wanted.specifier}"


def test_everything_that_the_project_asks_for_is_pinned_within_its_range():
    lines = [*PROJECT["build-system"]["requires"], *PROJECT["project"]["dependencies"]]
    lines += [line for extra in EXTRAS.values() for line in extra if not line.startswith("kvpolicy[")]

    assert disagreements(lines, PINS) == []


def test_what_is_installed_agrees_with_its_pins():
    """With a CUDA build of torch this holds for Triton too, of which it takes one release only."""
    assert disagreements(installed(), PINS) == []


def test_triton_is_the_one_that_torch_of_the_index_takes():
    """CPU builds say nothing of Triton, so this has to be said here. `.ci/resolve.py` asks the index itself."""
    assert (PINS["torch"], PINS["triton"]) == ("2.13.0", "3.7.1")


def test_asked_for_is_what_the_readme_installs_and_every_extra():
    found = resolve.asked_for(README, PROJECT)

    assert f"torch=={PINS['torch']}" in found
    wanted = [line for extra in EXTRAS.values() for line in extra if not line.startswith("kvpolicy[")]
    wheels = {line for line in wanted if not line.startswith(resolve.FROM_SOURCE)}
    assert set(wanted) - wheels == {"reasoning-gym==0.1.25"}
    assert wheels | set(PROJECT["project"]["dependencies"]) <= set(found)
    assert not any(line.startswith(("kvpolicy", ".", "-")) for line in found)


def test_readme_commands_are_read():
    assert list(resolve.installed_by(README)) == ["torch==2.13.0", ".[plots]", "torch==2.13.0", ".[test,lint]"]


def test_an_extra_that_is_not_there_is_said():
    with pytest.raises(SystemExit, match=r"no extra plot$"):
        resolve.asked_for(README.replace(".[plots]", ".[plot]"), PROJECT)


def test_what_is_resolved_without_a_pin_is_said():
    found = [{"name": "Pinned_One", "version": "1"}, {"name": "loose", "version": "2"}]
    report = {"install": [{"metadata": one} for one in found]}

    assert resolve.faults_of(report, {"pinned-one": "1"}) == ["loose==2"]


def wheel(folder, name, requires=(), tag="py3-none-any"):
    """A wheel with nothing in it."""
    info = f"{name}-1.dist-info"
    lines = [f"Name: {name}", "Version: 1", *(f"Requires-Dist: {one}" for one in requires)]
    with zipfile.ZipFile(folder / f"{name}-1-{tag}.whl", "w") as archive:
        archive.writestr(f"{info}/METADATA", "\n".join(["Metadata-Version: 2.1", *lines, ""]))
        archive.writestr(f"{info}/WHEEL", f"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: {tag}\n")
        archive.writestr(f"{info}/RECORD", "")


@pytest.fixture
def names(tmp_path):
    """What pip resolves `main` to for one Python, from a folder of wheels: names, or what pip said."""

    def resolved(version):
        options = ["--no-index", "--find-links", tmp_path]
        pip = resolve.begin(sys.executable, version, ["main"], options, tmp_path)
        said, _ = pip.communicate(timeout=100)
        if pip.returncode:
            return said
        report = json.loads((tmp_path / f"{version}.json").read_text("utf-8"))
        return sorted(one["metadata"]["name"] for one in report["install"])

    return resolved


def test_markers_are_those_of_the_python_asked_for(names, tmp_path):
    wheel(tmp_path, "main", ["old; python_version < '3.12'", "new; python_version >= '3.12'"])
    wheel(tmp_path, "old")
    wheel(tmp_path, "new")

    assert names("3.11") == ["main", "old"]
    assert names("3.13") == ["main", "new"]


def test_wheels_are_those_of_the_python_asked_for(names, tmp_path):
    wheel(tmp_path, "main", ["part"])
    wheel(tmp_path, "part", tag="cp312-none-any")

    assert names("3.12") == ["main", "part"]
    assert "No matching distribution found for part" in names("3.13")


def test_a_pin_that_contradicts_is_said(names, tmp_path, monkeypatch):
    """As torch of the index did of the Triton that was pinned."""
    file = tmp_path / "constraints.txt"
    file.write_text("part==2\n", "utf-8")
    monkeypatch.setattr(resolve, "CONSTRAINTS", file)
    wheel(tmp_path, "main", ["part==1"])
    wheel(tmp_path, "part")

    assert "ResolutionImpossible" in names("3.12")


def test_main_fails_when_one_python_does(monkeypatch, capsys, tmp_path):
    """Every Python has its line, and one failure is enough."""
    script = textwrap.dedent("""
        import json, sys
        folder, version = sys.argv[1:]
        if version == "3.12":
            sys.exit("no such wheel")
        one = {"metadata": {"name": "torch" if version == "3.11" else "loose", "version": "1"}}
        open(f"{folder}/{version}.json", "w").write(json.dumps({"install": [one]}))
    """)

    def begin(python, version, wanted, options, folder):
        command = [sys.executable, "-c", script, str(folder), version]
        return resolve.subprocess.Popen(command, stdout=-1, stderr=-2, text=True)

    monkeypatch.setattr(resolve, "begin", begin)
    monkeypatch.setattr(resolve, "settings", lambda _python: [])
    monkeypatch.setattr(resolve.venv, "create", lambda *_args, **_more: None)
    monkeypatch.setattr(resolve.subprocess, "run", lambda *_args, **_more: None)

    assert resolve.main(["3.11", "3.12", "3.13"]) == 1
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(":")[0] for line in lines] == ["Python 3.11", "Python 3.12", "Python 3.13"]
    assert ["all pinned" in line for line in lines] == [True, False, False]
    assert "DOES NOT RESOLVE" in lines[1]
    assert "NOT PINNED: loose==1" in lines[2]
