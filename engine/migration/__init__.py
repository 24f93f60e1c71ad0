"""Reads another trainer's settings from its configuration or script, as fields of dpoeng.

Scripts are parsed, never run.
"""
