"""The command line: programs, their help, hints for what cannot be composed, and the points of sweeps."""
