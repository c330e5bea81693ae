"""What `benchmarks.steps` compares: the variants of a training step, and the grid of runs."""

TRL = ("trl_default", "trl_precomputed", "trl_patched")
FLOORS = ("floor", "floor_all_tokens")
PROCESSES = ("prefopt", *TRL, "floor")  # one process measures both floors
VARIANTS = ("prefopt", *TRL, *FLOORS)
NAMES = {
    "prefopt": "prefopt, as it ships",
    "trl_default": "TRL, default",
    "trl_precomputed": "TRL, reference precomputed",
    "trl_patched": "TRL, precomputed, head patched",
    "floor": "floor",
    "floor_all_tokens": "floor, loss on all tokens",
}

# prefopt's objective: the arguments of TRL's DPOConfig for the same loss (docs/trl.md). All of them use a reference.
GRID = {
    "dpo": {"loss_type": "sigmoid"},
    "ipo": {"loss_type": "ipo"},
    "f_dpo": {"loss_type": "sigmoid", "f_divergence_type": "js_divergence"},
}
BETAS = (0.05, 0.1, 0.2, 0.5)
