"""HTML pages for a cache, a run, a check, a sweep and a benchmark, each a single file without external scripts."""
