"""One file a command of the command line: from settings or a run directory to a result."""
