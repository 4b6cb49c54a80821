"""Measuring: clocks, interleaved rounds, samples, deadlines, the machine, and the file of a result."""
