"""Services for long work: progress, processes, memory, atomic files and folders.

Knows nothing of pairs or models.
"""
