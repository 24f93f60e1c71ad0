"""`dpoeng bench`: parses options, runs the benchmarks in `dpoeng.bench`, prints tables."""
