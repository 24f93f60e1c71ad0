"""For other programs: the cache's numbers for other trainers, trained adapters and models for other runtimes."""
