"""One file per objective. A new one needs a file here and a YAML in `conf/objective/`, and no edit elsewhere."""

SIDES = ("chosen", "rejected")  # of a pair, as columns, log-probs and results name them
