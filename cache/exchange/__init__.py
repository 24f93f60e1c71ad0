"""Exports and imports rows as JSON Lines, Parquet or Arrow, and merges whole caches."""
