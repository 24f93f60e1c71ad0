"""Many runs of phase two on one cache: planned, trained to the end or to a rung, and ranked."""
