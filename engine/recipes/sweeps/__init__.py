"""Many runs of phase two over one cache: planned, trained to the end or to a rung, and ranked."""
