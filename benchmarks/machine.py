"""What a benchmark says of the machine that it ran on."""

import os
import platform
from pathlib import Path
from typing import Any


def processor() -> str:
    """The processor's name where the system tells it, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.machine()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())


def cpu() -> dict[str, Any]:
    """The device of a benchmark that ran on the processor."""
    return {
        "kind": "cpu",
        "architecture": platform.machine(),
        "processor": processor(),
        "cores": os.cpu_count(),
    }
