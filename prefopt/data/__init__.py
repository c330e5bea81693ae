"""From rows in a file to batches of token ids: formats -> tokenize -> sampler -> layout."""
