"""`python -m kvpolicy.bench …` is `kvpolicy bench …`."""

import runpy
import sys

if __name__ == "__main__":
    sys.argv.insert(1, "bench")
    runpy.run_module("kvpolicy", run_name="__main__", alter_sys=True)
