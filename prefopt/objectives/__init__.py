"""One file per objective. A new one needs a file here and a YAML in `conf/objective/`, and no edit elsewhere."""

from typing import Literal

Side = Literal["chosen", "rejected"]
# Of a pair, as columns, log-probs and results name them. Here and not in base.py: tables need it without torch.
SIDES: tuple[Side, Side] = ("chosen", "rejected")
# Of a group: the best response, the worst, and those between.
GROUP = (*SIDES, "others")
