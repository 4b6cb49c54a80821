"""Benchmarks of time and memory: ratios within one run, against baselines and against lower bounds."""
