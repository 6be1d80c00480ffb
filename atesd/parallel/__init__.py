"""Processes and sharded weights: one process, DDP, FSDP2 and DeepSpeed."""
