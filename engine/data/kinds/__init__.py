"""Rows that are no pairs: one response with a label, or several with scores."""
