"""Rows become batches: readers, folders, sources, formats, dataset, tokenize, cache, sampler, collate.

`hub` says what is missing.
"""
