"""`dpoeng cache`: shows, checks, exchanges and cleans a reference cache."""
