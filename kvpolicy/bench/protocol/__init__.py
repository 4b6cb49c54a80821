"""How anything is measured: clocks, turns, samples, deadlines, the machine, and the file of a result."""
