"""The wheel holds the four packages and nothing else, and works from anywhere; so does an editable install."""

import sys
import zipfile
from pathlib import Path

import pytest

from tests.support.building import ROOT, build, run, unpack

PACKAGES = {"kvpolicy", "kvpolicy_plugins", "kvpolicy_kernels", "kvpolicy_policies"}
USE = """
import kvpolicy, kvpolicy_plugins, kvpolicy_policies
policy = kvpolicy.load("rkv")
print(policy.digest, kvpolicy_plugins.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    return build("wheel", ROOT, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    folder = tmp_path_factory.mktemp("installed")
    return unpack(wheel, folder)


def test_wheel_holds_the_four_packages(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()

    top = {name.partition("/")[0] for name in names}
    assert {name for name in top if not name.endswith(".dist-info")} == PACKAGES


def test_wheel_holds_the_data(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())

    assert {"kvpolicy/py.typed", "kvpolicy_policies/rkv.yaml"} <= names
    assert "kvpolicy/evaluate/testbed/weights/model.safetensors" in names


@pytest.mark.parametrize("place", ["empty", "repository"])
def test_wheel_works_from(place, installed, tmp_path):
    cwd = ROOT if place == "repository" else tmp_path

    digest, plugins = run(sys.executable, "-c", USE, cwd=cwd, path=installed).split()

    assert len(digest) >= 16
    assert Path(plugins).is_relative_to(installed)


def test_editable_install_finds_every_package(tmp_path):
    editable = build("editable", ROOT, tmp_path)
    unpack(editable, tmp_path)
    look = f"""
import importlib.util, site
site.addsitedir({str(tmp_path)!r})
for name in {sorted(PACKAGES)}:
    print(importlib.util.find_spec(name).origin)
import importlib.resources, kvpolicy_policies
print(sorted(p.name for p in importlib.resources.files(kvpolicy_policies).iterdir() if p.name == "rkv.yaml"))
"""

    # -S: without the site-packages of this environment, which may hold an editable install already.
    lines = run(sys.executable, "-S", "-c", look, cwd=tmp_path).splitlines()

    assert all(Path(line).is_relative_to(ROOT) for line in lines[:4])
    assert lines[4] == "['rkv.yaml']"


def test_the_repository_shadows_no_distribution():
    look = "import importlib.util as u; s = u.find_spec('kernels'); print(s and s.origin)"

    assert run(sys.executable, "-c", look, cwd=ROOT).split()[-1] == "None"


def test_import_is_light():
    look = "import sys, torch, kvpolicy; print(sorted(set(sys.modules) & set(HEAVY)))"
    heavy = ["kvpolicy_plugins", "kvpolicy_kernels.score.score", "matplotlib", "typer"]

    assert run(sys.executable, "-c", look.replace("HEAVY", repr(heavy)), cwd=ROOT).strip() == "[]"
