"""alpaca-eval's evaluation, with a file of annotations that is written whole or not at all.

This module imports alpaca-eval. Import it inside `clients.alpaca_eval` only.
"""

import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
from alpaca_eval import evaluate
from alpaca_eval.annotators import PairwiseAnnotator

from prefopt.evaluation.annotations import write_annotations
from prefopt.utils.files import with_filename
from prefopt.utils.store import SEAL


class AtomicAnnotator(PairwiseAnnotator):
    """alpaca-eval's annotator, which writes its file after every chunk of answers. These answers were paid for, so a
    kill while it writes must not damage the file."""

    def save(self, path: str | None = None) -> None:
        """Replace the file by a complete new one. Raises OSError with the file's name where there is no room."""
        annotations = Path(path or self.caching_path)
        aside = annotations.with_suffix(".tmp")
        with with_filename(annotations):
            super().save(aside)
            write_annotations(annotations, json.loads(aside.read_text()))
            aside.unlink()

    def load_(self, path: str | None = None) -> None:
        """Read the file, with preferences as floats. Where all known ones are 1 or 2, pandas reads integers, and then
        has no room for the 1.5 of a later answer."""
        super().load_(path)
        known = self.df_annotations  # type: ignore[has-type]
        if known is not None:
            known = known.drop(columns=SEAL, errors="ignore").astype({"preference": float})
        self.df_annotations = known


def annotate(
    model: list[dict[str, Any]],
    reference: list[dict[str, Any]],
    judge: Path,
    annotations: Path,
    settings: dict[str, Any],
) -> list[dict[str, Any]]:
    """alpaca-eval's annotations of two models' answers to the same questions, in any order.

    `model` and `reference` are rows of {"index", "instruction", "output", "generator"}. `judge` is the folder with the
    judge's configuration, `annotations` the file that keeps its answers, `settings` go to `annotate_head2head`. Where
    the judge gave no preference it is None or NaN. Raises what the judge's client raises.
    """
    _, rows = evaluate(
        model_outputs=pd.DataFrame(model),
        reference_outputs=pd.DataFrame(reference),
        annotators_config=str(judge),
        name=model[0]["generator"],
        output_path=None,
        precomputed_leaderboard=None,
        is_return_instead_of_print=True,
        # Preferences may be missing still. The win rate is computed by the caller, once there are all.
        fn_metric=lambda _: {"win_rate": math.nan, "standard_error": math.nan},
        sort_by="win_rate",
        annotation_kwargs=settings,
        Annotator=AtomicAnnotator,
        caching_path=str(annotations),
    )
    return rows
