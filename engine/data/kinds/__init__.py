"""Rows that are not pairs: one response with a label, or several responses with scores."""
