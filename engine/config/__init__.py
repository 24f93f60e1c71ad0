"""Every setting, defined once: for dpoeng.yaml, for the command line and for Python.

Checks values and explains wrong ones, including the names that other trainers use. Opens no model and no cache.
"""
