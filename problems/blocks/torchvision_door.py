"""torchvision, through the only place of the project that imports it.

Its wheel on PyPI is compiled against one build of torch. Beside another of the same version (a CPU build from elsewhere)
its operators do not load, and `import torchvision` ends in "operator torchvision::nms does not exist". Nothing here uses
these operators; where they are missing, their schemas are declared in their place, and all that is written in Python
(data sets, models, transforms) works.
"""

from __future__ import annotations

import importlib
import sys
from functools import cache
from types import ModuleType

import torch

MISSING = "operator torchvision::nms does not exist"
SCHEMAS = ("nms", "qnms")
_declared: list[torch.library.Library] = []  # a library that is collected takes its schemas with it


@cache
def torchvision(part: str = "") -> ModuleType:
    """Module `torchvision`, or its `part`: `torchvision("models")` is `torchvision.models`.

    Raises ImportError with what to install if it is not there.
    """
    name = f"torchvision.{part}" if part else "torchvision"
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "torchvision" or "torchvision" in sys.modules:
            raise
        raise ImportError("torchvision is not installed; it comes with `pip install mlo`") from error
    except RuntimeError as error:
        if MISSING not in str(error) or _declared:
            raise
    for half_imported in [known for known in sys.modules if known.partition(".")[0] == "torchvision"]:
        del sys.modules[half_imported]
    library = torch.library.Library("torchvision", "DEF")
    _declared.append(library)
    for operator in SCHEMAS:
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    return importlib.import_module(name)
