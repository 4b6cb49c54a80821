"""Dtypes, a division and a mark that tests of several kernels share."""

import pytest
import torch

from kvpolicy_kernels.division import Division

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = Division(16, 32, 3)  # of segments of up to 96 entries
LOUD = pytest.mark.filterwarnings("ignore::RuntimeWarning")  # NumPy reports overflows that a GPU does not
