"""Commands that show a run from its folder: as a page, or in the terminal while it trains."""
