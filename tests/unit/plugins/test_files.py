"""What is asked of the source files of plugins."""

from pathlib import Path

import kvpolicy_plugins

FOLDER = Path(kvpolicy_plugins.__file__).parent
MOST_LINES = 150


def test_files_are_short():
    lines = {
        str(file.relative_to(FOLDER)): len(file.read_text(encoding="utf-8").splitlines())
        for file in FOLDER.rglob("*.py")
    }
    assert {"__init__.py", "mergers/keepkv.py", "codecs/shared/calibrated/basis.py"} <= lines.keys()
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}
