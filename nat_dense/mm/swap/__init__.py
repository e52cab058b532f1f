"""Another backbone under any model: `swap_backbone(cfg, "nat-tiny")`.

Start with `plan.py`, then `maps.py` (what the old backbone returns), `wiring.py` (who reads it), `training.py` (weights
and optimizer), `refusals.py` (what can't be swapped) and `changes.py` (what differs).
"""

from nat_dense.mm.swap.changes import Change
from nat_dense.mm.swap.plan import BACKBONES, Swap, plan_swap, swap_backbone
from nat_dense.mm.swap.refusals import SwapRefusedError

__all__ = ["BACKBONES", "Change", "Swap", "SwapRefusedError", "plan_swap", "swap_backbone"]
