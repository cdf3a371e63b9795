"""Drop-in modules."""

from dpo_fast.modules.head import FusedHead

__all__ = ["FusedHead"]
