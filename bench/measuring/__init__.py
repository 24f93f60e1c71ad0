"""Tools of all benchmarks: time, memory, the machine, and records of results."""
