"""Ranks, DeepSpeed engines, and the starting of ranks: the only room that imports torch.distributed or deepspeed."""
