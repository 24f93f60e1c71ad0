"""Files that other programs wrote: checks their claims before a library trusts them."""
