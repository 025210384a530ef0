"""The most memory that a run has held."""

from __future__ import annotations

import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import torch


def peak_memory(device: torch.device) -> dict[str, int | None]:
    """In bytes, since this process began: None where the system or the device does not say.

    - `resident`: of the process in main memory, libraries and data sets with it.
    - `device`: of tensors on an accelerator, as torch's allocator counts them.
    """
    on_device = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
    return {"resident": _resident(), "device": on_device}


def _resident() -> int | None:
    # Linux hands a parent's `ru_maxrss` on to the programs it starts, and only this file tells them apart.
    status = Path("/proc/self/status")
    if status.is_file() and (found := re.search(r"^VmHWM:\s*(\d+) kB$", status.read_text(), re.MULTILINE)):
        return 1024 * int(found[1])
    try:
        resource: Any = import_module("resource")
    except ModuleNotFoundError:  # Windows
        return None
    most: int = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if sys.platform == "darwin" else 1024 * most
