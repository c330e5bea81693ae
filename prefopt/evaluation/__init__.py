"""Evaluations of finished policies, which write JSON records: LM-Harness, AlpacaEval, MT-Bench, Arena-Hard."""
