"""Runs the kernel tests of a checkout on this machine, within a time limit."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

_MARKS = re.compile(r"^([.FEsxX]+)(?: +\[ *\d+%\])?$", re.MULTILINE)
_TAIL = 2000  # characters of the output that are kept
_MOST_WORKERS = 14
_LEAST = 5.0  # seconds below which no run is worth starting
CHECKOUT = Path(__file__).parents[3]


def kernel_tests(seconds: float, checkout: Path = CHECKOUT) -> dict[str, Any]:
    """Counts of passed and failed tests; without tests, pytest or time, why they did not run."""
    reason = _obstacle(seconds, checkout)
    if reason:
        return {"ran": False, "why": reason}
    compiling = "tests/kernels/test_compiled.py"  # for other devices: says nothing of this one
    command = [sys.executable, "-m", "pytest", "tests/kernels", f"--ignore={compiling}", "-q", "-p", "no:cacheprovider"]
    if find_spec("xdist") is not None:  # most of the time goes into compiling kernels, on the host
        command += ["-n", str(max(1, min(_MOST_WORKERS, (os.cpu_count() or 1) - 1)))]
    environment = {name: value for name, value in os.environ.items() if name != "PYTEST_ADDOPTS"}  # marks are counted
    try:
        done = subprocess.run(  # noqa: S603 - this Python, on tests of this checkout
            command, cwd=checkout, env=environment, capture_output=True, text=True, check=False, timeout=seconds
        )
    except subprocess.TimeoutExpired as late:
        output = late.stdout or b""
        text = output.decode(errors="replace") if isinstance(output, bytes) else output
        return {"ran": True, "finished": False, "exit_code": None, **_counted(text)}
    return {"ran": True, "finished": True, "exit_code": done.returncode, **_counted(done.stdout + done.stderr)}


def _obstacle(seconds: float, checkout: Path) -> str:
    if not (checkout / "tests" / "kernels").is_dir():
        return "this is not a checkout with tests/kernels"
    if find_spec("pytest") is None:
        return "pytest is not installed"
    return "" if seconds >= _LEAST else "no time was left"


def _counted(text: str) -> dict[str, Any]:
    marks = "".join(_MARKS.findall(text))
    failed = sum(map(marks.count, "FE"))
    return {"passed": marks.count("."), "failed": failed, "tail": text[-_TAIL:] if failed or not marks else ""}
