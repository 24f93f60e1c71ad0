"""What any long work needs from the machine: progress, processes, memory, whole files and folders.

Knows nothing of pairs or models.
"""
