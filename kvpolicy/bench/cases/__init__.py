"""The benchmarks, one a file, and the filled layers and lower bounds that several of them use."""
