"""Rows become batches: sources (by readers), formats, dataset, tokenize, cache, sampler, collate; hub: what is missing."""
