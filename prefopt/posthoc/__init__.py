"""Evaluations of a policy beside the training loop."""
