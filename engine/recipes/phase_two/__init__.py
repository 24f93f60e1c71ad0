"""Parts of phase two that need no model: what is trained, and the report of a finished run. Import no torch."""
