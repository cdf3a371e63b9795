"""The interfaces of other libraries, with dpo_fast behind them. Import the module of the library:

liger           classes of liger-kernel; liger_loss is what those of preferences share; liger_kto,
                liger_grpo (with grpo_losses) and liger_distillation have the others
trl             trainers of TRL; trl_forward scores, trl_losses divides the losses
transformers    `PreferenceTrainer`; collator makes its batches
forward         puts our head and a second forward into a model
"""
