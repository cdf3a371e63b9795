"""dpo_fast from Python: the engine of the command line, on objects as well as on paths."""

from dpo_fast.api.run import PreferenceRun, Result

__all__ = ["PreferenceRun", "Result"]
