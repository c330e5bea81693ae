"""Rows become batches: readers, sources, formats, dataset, tokenize, cache, sampler, collate.

`hub` says what is missing.
"""
