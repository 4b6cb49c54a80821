"""Each pair in a process of its own, ended when it takes too long: a class that hangs or keeps state hurts nobody."""

from multiprocessing.connection import Connection

import torch

from tests.models_sweep.examine import NOT_TRIED, WRONG, Verdict, examine
from tests.models_sweep.pairs import Pair
from tests.support import forked

SECONDS = 120


def examine_apart(pair: Pair, seconds: float = SECONDS) -> Verdict:
    """The verdict on a pair, from a child process."""
    context = forked.context()
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_send, args=(pair, there), daemon=True)
    child.start()
    there.close()
    try:
        return here.recv() if here.poll(seconds) else Verdict(pair.name, "", NOT_TRIED, (f"takes {seconds:g} s",))
    except EOFError:
        child.join()
        return Verdict(pair.name, "", WRONG, (f"the process ended with {child.exitcode}",))
    finally:
        child.kill()
        child.join()
        here.close()


def _send(pair: Pair, there: Connection) -> None:
    torch.set_num_threads(1)
    there.send(examine(pair))
    there.close()
