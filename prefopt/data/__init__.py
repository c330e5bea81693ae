"""Rows become batches: sources, formats, dataset, tokenize, cache, sampler, collate; hub says what is missing."""
