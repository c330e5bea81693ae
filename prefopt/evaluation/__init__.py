"""A policy becomes a JSON record: LM-Harness, AlpacaEval."""
