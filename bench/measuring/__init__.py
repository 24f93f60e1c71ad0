"""Time, memory and the machine: what every benchmark measures with, and how results are recorded."""
