"""One loop, and what it is built from."""
