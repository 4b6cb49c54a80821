"""Whether constraints.txt resolves against a plain package index, for other Pythons than the one that runs this.

    python3 .ci/resolve.py 3.11 3.12 3.13

Asked for is what the README's marked commands install, and what every other extra of pyproject.toml needs, as far as
it comes in wheels. pip cannot build `.[test]` for another Python out of wheels alone, so `.` is replaced by what
pyproject.toml says of it. Wheels, further indices and constraints of this machine's own pip settings do not count, its
main index does. Nothing is installed, and no wheel is downloaded where the index serves metadata or parts of files.

One line a Python; exit code 1 when one does not resolve, or when what it resolves to is not all pinned. Needs nothing
but Python 3.11 or later with venv, and a package index.
"""

import json
import os
import re
import shlex
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONSTRAINTS = ROOT / "constraints.txt"
PIP = "pip==26.3"  # the first argument of its `-c` program below relies on where this release keeps its markers
KEPT = ("index-url", "cert", "client-cert", "proxy", "trusted-host", "timeout", "retries")  # of this machine's settings
SECONDS = 900
# Some of what this needs is published as source only, and for other Pythons pip takes wheels only.
FROM_SOURCE = ("reasoning-gym",)
Pip = subprocess.Popen[str]

# `--python-version` chooses wheels, but pip goes on to judge markers such as `python_version < "3.12"` by the Python
# that runs it. So they are told here which Python is meant.
AS_PYTHON = """
import sys
from pip._internal.cli.main import main
from pip._vendor.packaging import markers
version, own = sys.argv.pop(1), markers.default_environment
markers.default_environment = lambda: {**own(), "python_version": version, "python_full_version": version + ".0"}
sys.exit(main())
"""


def asked_for(readme: str, project: Mapping[str, Any]) -> list[str]:
    """The requirements of the README's `pip install`s and of every extra, each once, without the project itself."""
    table = project["project"]
    found = [*project["build-system"]["requires"], *table["dependencies"]]
    for word in installed_by(readme):
        here = re.fullmatch(r"\.(?:\[([\w,-]+)\])?", word)
        if here is None:
            found.append(word)
        elif unknown := set((here[1] or "").split(",")) - {"", *table["optional-dependencies"]}:
            raise SystemExit(f"README.md: pyproject.toml has no extra {', '.join(sorted(unknown))}")
    for extra in table["optional-dependencies"].values():
        found += [one for one in extra if not one.startswith(f"{table['name']}[")]  # such as kvpolicy[plots]
    return [one for one in dict.fromkeys(found) if not one.startswith(FROM_SOURCE)]


def installed_by(readme: str) -> Iterator[str]:
    """What the commands marked `<!-- command: NAME -->` install: the words of `pip install` that are no options."""
    for block in re.findall(r"^<!-- command: \w+ -->\n```bash\n(.*?)^```", readme, flags=re.DOTALL | re.MULTILINE):
        for command in block.replace("\n", "&&").split("&&"):
            words = shlex.split(command)
            if words[:2] != ["pip", "install"]:
                continue
            names = iter(words[2:])
            for word in names:
                if word in {"-c", "--constraint"}:
                    next(names)
                elif not word.startswith("-"):
                    yield word


def pinned(constraints: str) -> dict[str, str]:
    """Version by normalised name."""
    lines = (line.partition("#")[0].partition(";")[0].strip() for line in constraints.splitlines())
    return {normalised(name): version for name, _, version in (line.partition("==") for line in lines if line)}


def normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def faults_of(report: Mapping[str, Any], pins: Mapping[str, str]) -> list[str]:
    """What was resolved, but not to a version that constraints.txt names."""
    found = (one["metadata"] for one in report["install"])
    return sorted(f"{one['name']}=={one['version']}" for one in found if pins.get(normalised(one["name"])) is None)


def settings(python: Path) -> list[str]:
    """The index of this machine and how it is reached, as options; its extra indices and folders of wheels left out."""
    said = subprocess.run([python, "-m", "pip", "config", "list"], capture_output=True, text=True, check=True).stdout
    found = dict(re.findall(r"^(?:global|install|:env:)\.([\w-]+)='(.*)'$", said, flags=re.MULTILINE))
    return [f"--{key}={found[key]}" for key in KEPT if key in found]


def begin(python: Path, version: str, wanted: Iterable[str], options: Iterable[str], folder: Path) -> Pip:
    """pip, at work on one Python; its report will be `folder`/VERSION.json."""
    command = [
        *(python, "-c", AS_PYTHON, version, "install", "--dry-run", "--ignore-installed", "--target", folder / "none"),
        *("--python-version", version, "--only-binary=:all:", "--use-feature=fast-deps", "--quiet", "--no-input"),
        *("--constraint", CONSTRAINTS, "--report", folder / f"{version}.json", *options, *wanted),
    ]
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "PYTHON"))}
    return subprocess.Popen(
        list(map(str, command)),
        env={**clean, "PIP_CONFIG_FILE": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def main(versions: list[str]) -> int:
    wanted = asked_for(
        (ROOT / "README.md").read_text(encoding="utf-8"),
        tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8")),
    )
    pins = pinned(CONSTRAINTS.read_text(encoding="utf-8"))
    failed = 0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        venv.create(folder / "pip", with_pip=True)
        python = folder / "pip" / "bin" / "python"
        options = settings(python)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *options, PIP], check=True)
        running = {version: begin(python, version, wanted, options, folder) for version in versions}
        for version, pip in running.items():
            said, _ = pip.communicate(timeout=SECONDS)
            if pip.returncode:
                print(said, end="", file=sys.stderr)
                failed += 1
                print(
                    f"Python {version}: constraints.txt DOES NOT RESOLVE, pip ended with {pip.returncode}", flush=True
                )
                continue
            report = json.loads((folder / f"{version}.json").read_text(encoding="utf-8"))
            free = faults_of(report, pins)
            failed += bool(free)
            outcome = f"NOT PINNED: {', '.join(free)}" if free else "all pinned by constraints.txt"
            print(f"Python {version}: {len(report['install'])} distributions resolve, {outcome}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
