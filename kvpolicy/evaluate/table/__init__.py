"""The evaluation table: every policy's bytes, accuracy, attention error and decode time, from one run."""
