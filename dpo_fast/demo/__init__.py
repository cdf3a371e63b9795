"""`dpo-fast demo`: a tiny model, from nothing to DPO, on a CPU in about two minutes."""

from dpo_fast.demo.run import run_demo

__all__ = ["run_demo"]
