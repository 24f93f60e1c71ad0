"""Services for long work: progress, processes, memory, atomic files and folders.

Independent of pairs and models.
"""
