"""`dpoeng bench`: parses options, runs what `dpoeng.bench` holds, prints tables."""
