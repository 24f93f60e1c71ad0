"""Finds problems that could spoil a run: in the text of pairs, and in the libraries of this machine.

Reports findings and changes nothing.
"""
