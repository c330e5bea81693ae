"""Models: loading, conversion, digests."""
