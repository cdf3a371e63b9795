"""The interfaces of other libraries, with dpo_fast behind them. Nothing of them is imported here."""
