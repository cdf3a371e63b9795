"""Drop-in modules."""

from dpo_fast.modules.fused import FusedLinearPreferenceLoss
from dpo_fast.modules.head import FusedHead
from dpo_fast.modules.losses import PreferenceLoss, UnpairedPreferenceLoss

__all__ = ["FusedHead", "FusedLinearPreferenceLoss", "PreferenceLoss", "UnpairedPreferenceLoss"]
