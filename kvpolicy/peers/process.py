"""A worker in the environment of the peers that answers one request after another, each a line of JSON."""

import json
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from kvpolicy.errors import InputError, one_line


class PeerProcess:
    """A process that is started when it is first asked, and again after it has ended before its time.

    It reads one line of JSON for each request from its input and writes one line for each answer to its output.
    """

    def __init__(self, python: Path, arguments: Sequence[str], greeting: Mapping[str, Any], seconds: float) -> None:
        """`greeting` is the first request of every process; `seconds` is how long an answer may take."""
        self._command = [str(python), "-I", *arguments]
        self._greeting = greeting
        self._seconds = seconds
        self._process: subprocess.Popen[str] | None = None
        self._said: IO[str] | None = None  # what the process writes to stderr
        self.greeted: dict[str, Any] = {}  # the answer to the greeting

    def ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        """The answer to a request. Raises InputError when there is none: then the process has been ended."""
        if self._process is None:
            self._start()
            self.greeted = self._answer(self._greeting)
        return self._answer(request)

    def close(self) -> None:
        """End the process, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()  # which closes its pipes
        if self._said is not None:
            self._said.close()
            self._said = None

    def _start(self) -> None:
        self._said = tempfile.TemporaryFile("w+", errors="replace")  # noqa: SIM115 - closed with the process
        try:
            self._process = subprocess.Popen(  # noqa: S603 - the Python that `install` made, and our own file
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._said, text=True
            )
        except OSError as error:
            self.close()
            raise InputError(f"peer: {one_line(error)}") from error

    def _answer(self, request: Mapping[str, Any]) -> dict[str, Any]:
        process = self._process
        if process is None or process.stdin is None or process.stdout is None:
            raise InputError("peer: its process has ended")
        late = threading.Event()

        def end() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(self._seconds, end)
        timer.start()
        try:
            process.stdin.write(json.dumps(request) + "\n")
            process.stdin.flush()
            found = json.loads(process.stdout.readline())
        except (OSError, ValueError) as error:
            reason = f"took more than {self._seconds:.0f} s" if late.is_set() else self._last_words()
            self.close()
            raise InputError(f"peer: {reason}") from error
        finally:
            timer.cancel()
        if not isinstance(found, dict):
            self.close()
            raise InputError("peer: its answer is no object")
        return found

    def _last_words(self) -> str:
        """How the process ended: the last line that it wrote to stderr, or its exit code."""
        process, said = self._process, self._said
        if process is None or said is None:
            return "its process has ended"
        process.kill()
        code = process.wait()
        said.seek(0)
        lines = [line for line in said.read().splitlines() if line.strip()]
        return one_line(lines[-1]) if lines else f"its process ended with code {code} and no output"
