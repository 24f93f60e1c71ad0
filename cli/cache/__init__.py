"""`dpoeng cache`: shows, verifies, exports, imports and cleans a reference cache."""
