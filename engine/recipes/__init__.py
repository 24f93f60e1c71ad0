"""Each command's work, one module per command: `cli/X.py` parses and prints, `recipes/X.py` does it.

Recipes combine the other wings and contain no arithmetic. They know no terminal: progress and notes go through
`runtime.progress`.
"""
