"""Rows out of a cache and into one: columns in JSON Lines, Parquet or Arrow, and whole caches merged."""
