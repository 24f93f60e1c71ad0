"""The command line: one module a command; each parses, builds a config, calls the engine and prints."""
