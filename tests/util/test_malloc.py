"""Freed memory is kept, so that it is not mapped again for every allocation."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import numpy
from metareg.util.malloc import keep_freed_memory

if sys.argv[1] == "keep":
    assert keep_freed_memory()
def use():
    first, second = numpy.ones(4 << 20, "b"), numpy.ones(3 << 20, "b")
use()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    use()
print((resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) / 50)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc can be told to keep freed memory")
def test_freed_memory_is_taken_again() -> None:
    def faults(how: str) -> float:
        return float(subprocess.run([sys.executable, "-c", PROGRAM, how], check=True, capture_output=True).stdout)

    assert faults("keep") < 1 < 5 < faults("leave")
