"""Each command's work, one module a command: `cli/X.py` parses and prints, `recipes/X.py` does it.

Recipes put the other wings together and hold no arithmetic of their own. They know no terminal: progress and notes go
through `runtime.progress`.
"""
