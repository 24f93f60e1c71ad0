"""The command line: one module per command, which parses, builds a config, calls the engine and prints."""
