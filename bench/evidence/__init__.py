"""The first minutes on a borrowed GPU, as one command: measures what needs a GPU, stage by stage.

    python -m dpoeng.bench.evidence --output gpu-evidence     # `make gpu-evidence`

Each stage runs in a separate process with a time limit, and its result is written when it is done. So a run that is
cut off, or a kernel that kills its process, still leaves the earlier results.
"""
