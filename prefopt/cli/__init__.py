"""The command line: Hydra composes, errors are shown, the exit code tells."""
