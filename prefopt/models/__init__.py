"""Policy and reference: loading, LoRA, packed attention, log-probabilities, the reference's cache."""
