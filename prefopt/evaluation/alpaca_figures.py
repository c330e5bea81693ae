"""The figures of AlpacaEval: win rates with their errors and intervals, from complete annotations."""

from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from prefopt.evaluation.clients import alpaca_eval

RESAMPLES = 10_000  # of the bootstrap


def summarize(annotations: list[dict[str, Any]], length_controlled: bool) -> dict[str, Any]:
    """alpaca-eval's figures of complete annotations, in percent, with 95 % intervals of a bootstrap over questions.

    `length_controlled` needs all of AlpacaEval's questions: `index` joins them with their difficulty. The standard
    error and the interval of that win rate take the fitted GLM as fixed.
    """
    import pandas as pd

    frame = pd.DataFrame(annotations)
    preferences = frame["preference"].astype(float)
    lengths = {side: frame[f"output_{k}"].str.len() for side, k in (("baseline", 1), ("model", 2))}
    figures: dict[str, Any] = {
        "n": len(frame),
        "mean_length": {side: float(values.mean()) for side, values in lengths.items()},
        "equal_outputs": int((frame["output_1"] == frame["output_2"]).sum()),
        "letter_missing": sum(_letter_missing(row) for row in annotations),
    }
    with alpaca_eval() as package, TemporaryDirectory() as scratch:
        # Where no answer differs in length the GLM's length feature is 0 / 0, and there is nothing to control for. A
        # baseline against itself is allowed: alpaca-eval gives 50 by definition.
        against_itself = (frame["generator_1"] == frame["generator_2"]).all()
        if length_controlled and (against_itself or (lengths["model"] - lengths["baseline"]).std() > 0):
            frame = frame[["index", "preference", "output_1", "output_2", "generator_1", "generator_2"]]
            # alpaca-eval adds the column glm_preference to `frame`, and writes the GLM's weights as a CSV.
            results = package.metrics.get_length_controlled_winrate(frame, save_weights_dir=scratch)
            (file,) = Path(scratch).rglob("*.csv")
            figures["length_controlled_win_rate"] = float(results["length_controlled_winrate"])
            figures["lc_standard_error"] = float(results["lc_standard_error"])
            figures["lc_interval"] = bootstrap(100 * frame["glm_preference"].to_numpy(dtype=float))
            figures["glm"] = {k: float(v) for k, v in pd.read_csv(file, index_col=0).iloc[0].items()}
        else:
            results = package.metrics.get_winrate(frame)
    for key in ("win_rate", "standard_error", "discrete_win_rate"):
        figures[key] = float(results[key])
    figures["interval"] = bootstrap(100 * (preferences.to_numpy() - 1))
    return figures


def bootstrap(values: np.ndarray, weights: np.ndarray | None = None) -> list[float]:
    """The 95 % percentile interval of sum(values) / sum(weights), [low, high]; without weights, of the mean. Both are
    (questions,). A resample draws questions, each with all that was judged of it."""
    weights = np.ones(len(values)) if weights is None else weights
    generator = np.random.default_rng(0)
    drawn = (generator.integers(0, len(values), len(values)) for _ in range(RESAMPLES))
    means = [values[rows].sum() / weights[rows].sum() for rows in drawn]
    return [float(q) for q in np.quantile(means, [0.025, 0.975])]


def _letter_missing(row: dict[str, Any]) -> bool:
    """Whether the judge's log-probs hold only one of the letters m and M. alpaca-eval then gives that letter all
    of the probability."""
    completion: Any = row.get("preference_raw_completion")
    if not isinstance(completion, dict) or not completion.get("logprobs"):
        return False
    return len({"m", "M"} & {top["token"] for top in completion["logprobs"]["content"][0]["top_logprobs"]}) == 1
