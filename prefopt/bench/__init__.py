"""Measurements, run by `make bench`. Each writes a file in results/bench/ that names the machine."""
