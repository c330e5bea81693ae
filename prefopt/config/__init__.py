"""Typed configuration: shared nodes, parsing, hardware."""
