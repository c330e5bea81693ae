"""Responses become rewards."""
