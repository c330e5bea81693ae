"""What a run is, where it lies, and what became of it."""
