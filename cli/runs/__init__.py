"""Commands that look at a run in its folder: as a page, and in the terminal while it trains."""
