"""The first minutes on a lent GPU, as one command: what can only be seen there, stage by stage.

    python -m dpoeng.bench.evidence --output gpu-evidence     # `make gpu-evidence`

Each stage runs in a process of its own under a limit of time, and its result is written when it is done, so that a run
that is cut off, or a kernel that ends its process, still leaves what came before.
"""
