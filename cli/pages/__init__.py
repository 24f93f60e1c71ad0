"""HTML pages: a cache, a run, a check, a sweep and a benchmark, each as one file without scripts from elsewhere."""
