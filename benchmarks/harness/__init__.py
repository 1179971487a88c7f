"""What all commands share: the command line, the store of runs, files, pictures and tables."""
