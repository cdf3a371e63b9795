"""The trainer: configuration, engine, loop, checkpoints, metrics.

config.py       the whole run as typed data; YAML plus key=value
distributed.py  processes, ranks and barriers
prepare.py      from a configuration to everything a run needs
engine.py       the DeepSpeed engine and its configuration
step.py         one optimiser step
loop.py         train()
evaluate.py     metrics on held-out pairs
metrics.py      sums on the device, means over all ranks
checkpoints.py  complete or absent; exact resume
export.py       a plain Hugging Face folder
"""
