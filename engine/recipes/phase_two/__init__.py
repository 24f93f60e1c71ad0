"""Parts of phase two that need no model: what is trained, what a finished run tells. Import no torch."""
