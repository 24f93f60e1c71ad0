"""Offline-reference DPO: score the reference once, train against the numbers."""
