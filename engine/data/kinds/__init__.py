"""Rows that are no pairs: what is done with them beside what `shapes` and `pairs` do with every row."""
