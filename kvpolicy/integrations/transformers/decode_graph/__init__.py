"""Decode steps of fixed shapes in storages that never move: what CUDA graphs and `torch.compile` can take over."""
