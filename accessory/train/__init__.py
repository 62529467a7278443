"""One loop for pretraining, finetuning, PEFT and visual instructions, exact under sharding, death and restart.

Must not know how a checkpoint lies in its files or how text becomes tokens.
"""
