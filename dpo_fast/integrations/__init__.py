"""The interfaces of other libraries, with dpo_fast behind them. Import the module of the library:

liger           classes of liger-kernel; liger_loss is what they share
trl             trainers of TRL; trl_forward scores, trl_losses divides the losses
transformers    `PreferenceTrainer`; collator makes its batches
forward         puts our head and a second forward into a model
"""
