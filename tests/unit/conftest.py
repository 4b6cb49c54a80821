"""Fake distributions: real folders on sys.path, found the way installed ones are."""

import importlib
import sys
import textwrap

import pytest

from kvpolicy.stages.registry.plugins import registry

HEADER = """
from kvpolicy.stages import *
from kvpolicy.stages import contracts
import attrs, kvpolicy.stages
from kvpolicy.stages import hookimpl
"""


@pytest.fixture
def install(tmp_path, monkeypatch):
    """Puts a distribution with one entry point on sys.path, and forgets the registry."""
    before = set(sys.modules)

    def put(name, source, *, version="1.0", entry=None, module=None, files=()):
        folder = tmp_path / f"{name}-{version}"
        module = module or f"fake_{name.replace('-', '_')}_{len(list(tmp_path.iterdir()))}"
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        (info / "entry_points.txt").write_text(f"[kvpolicy]\n{entry or name} = {module}\n")
        (folder / f"{module}.py").write_text(HEADER + textwrap.dedent(source))
        for path, text in dict(files).items():
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            (folder / path).write_text(text)
        monkeypatch.syspath_prepend(str(folder))
        registry.cache_clear()
        return module

    registry.cache_clear()
    yield put
    for module in set(sys.modules) - before:
        if module.startswith("fake_"):
            del sys.modules[module]
    monkeypatch.undo()
    importlib.invalidate_caches()
    registry.cache_clear()


@pytest.fixture
def scorer_source():
    """Writes a module that offers one scorer, with parameters as given."""

    def source(name, *parameters, title="A fake scorer.", hook="kvpolicy_stages"):
        body = "".join(f"    {line}\n" for line in parameters)
        return (
            f'@attrs.frozen\nclass Fake(Scorer):\n    """{title}\n\n    More.\n    """\n    name = {name!r}\n'
            f"{body}    def score(self, view):\n        return view.keys[..., 0]\n"
            f"@hookimpl\ndef {hook}():\n    return [Fake]\n"
        )

    return source
