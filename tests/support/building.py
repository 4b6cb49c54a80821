"""Builds wheels of this repository and runs programs against them, with Triton and without it."""

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
HIDE_TRITON = """
import sys

class Without:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, *rest):
        return None if name.partition(".")[0] == "triton" else self.finder.find_spec(name, *rest)
    def __getattr__(self, name):
        return getattr(self.finder, name)

sys.meta_path[:] = map(Without, sys.meta_path)
import importlib.util
assert importlib.util.find_spec("triton") is None
"""
TOGETHER = """
import contextlib, io, json, sys, traceback

told = {}
for name, program in json.loads(sys.argv[1]).items():
    printed, error = io.StringIO(), ""
    try:
        with contextlib.redirect_stdout(printed):
            exec(program, {"__name__": "__main__", "sys": sys})
    except BaseException as raised:
        error = "" if isinstance(raised, SystemExit) and not raised.code else traceback.format_exc()
    told[name] = printed.getvalue(), error
print(json.dumps(told))
"""
COMMAND = """
import runpy
sys.argv = {words!r}
runpy.run_module("kvpolicy", run_name="__main__", alter_sys=True)
"""


def run(*command, cwd, path="", **environment):
    """Standard output of a command that must succeed."""
    env = {**os.environ, "PYTHONPATH": str(path), **environment}
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)  # noqa: S603
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_together(programs, *options, first="", **where):
    """By name, what each program printed and the error that ended it: one after another in one process."""
    return json.loads(run(sys.executable, *options, "-c", first + TOGETHER, json.dumps(programs), **where))


def printed(told, name):
    """What a program of `run_together` printed; it must have succeeded."""
    text, error = told[name]
    assert not error, error
    return text


def build(kind, source, folder):
    """The path of a wheel, built by the backend that this environment has."""
    hook = f"import hatchling.build as b; print(b.build_{kind}({str(folder)!r}))"
    name = run(sys.executable, "-c", hook, cwd=source).split()[-1]
    return folder / name


def unpack(wheel, folder):
    """The folder, with the contents of a wheel of our own in it."""
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder)
    return folder
