"""Torch for the modules that plan: torch itself, or its stand-in while ``chunked-ce plan`` runs.

The engine and the planner share the memory law, its settings and options. In a process that only plans, ``torch`` here
is `chunked_ce.torch_stand_in`, which has the few names that these modules use.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

__all__ = ["LIGHT", "torch"]

LIGHT: bool = getattr(sys.modules.get("chunked_ce_command"), "is_light", False)

if TYPE_CHECKING or not LIGHT:
    import torch as torch
else:
    from chunked_ce import torch_stand_in as torch
