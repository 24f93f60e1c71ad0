"""Another trainer's settings, read from its configuration or script, as fields of dpoeng.

Scripts are parsed, never run.
"""
