"""Processes that begin with torch and transformers imported: forks of one that did nothing else."""

import multiprocessing
import os
import sys
from multiprocessing.context import ForkServerContext
from multiprocessing.reduction import DupFd

_PRELOADED = [
    "torch",
    "transformers",
    "transformers.generation",
    "kvpolicy",
    "kvpolicy.evaluate.models",
    "tests.models_sweep.examine",
]


def context() -> ForkServerContext:
    """Where such processes come from; the one that they are forks of is started for the first of them."""
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(_PRELOADED)
    return made


class ForkedProgram:
    """A program, as text, in a process of its own; what it writes to stdout and stderr comes by one pipe."""

    def __init__(self, program: str) -> None:
        reading, writing = os.pipe()
        self.output = os.fdopen(reading)
        self._process = context().Process(target=_run, args=(program, dict(os.environ), DupFd(writing)), daemon=True)
        self._process.start()
        os.close(writing)

    @property
    def pid(self) -> int:
        assert self._process.pid is not None
        return self._process.pid

    def end(self, seconds: float = 100) -> str:
        """What it has written and nobody has read, once it has ended."""
        self._process.join(seconds)
        assert self._process.exitcode is not None, f"still there after {seconds} s"
        with self.output:
            return self.output.read()


def _run(program: str, environment: dict[str, str], writing: "DupFd") -> None:
    os.environ.clear()
    os.environ.update(environment)
    descriptor = writing.detach()
    for standard in (sys.stdout.fileno(), sys.stderr.fileno()):
        os.dup2(descriptor, standard)
    os.close(descriptor)
    exec(program, {"__name__": "__main__"})  # noqa: S102 - a test's own program
