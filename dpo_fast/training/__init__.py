"""The trainer: from a configuration to a trained model.

config, sections      the whole run as typed data; YAML plus key=value
config_schema, config_docs  its JSON schema, and docs/CONFIG.md
prepare, fit          from a configuration to all that a run works with, and whether it fits together
loop                  train(); one update, evaluation, checkpoints, resuming
step                  one optimiser step; evaluation; the check before the first
loss_pass             the loss of a micro-batch
load_data, splits     the examples of a run and their batches
references, drawn, precompute  the reference of a run: what will be asked for, found or computed
engine                DeepSpeed
environment, distributed, peers, launchers   processes and ranks, and what becomes of them
signals, lock         how a run ends early; one run in a folder
checkpoints, export   what is kept
metrics, perf, run_log, console  what is measured, logged and shown
"""
