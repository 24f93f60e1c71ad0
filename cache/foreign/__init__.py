"""Files that somebody else wrote: what they claim is checked before a library believes it."""
