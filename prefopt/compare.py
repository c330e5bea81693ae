"""Read what two runs answer: an HTML page with prompts, both answers side by side, their lengths and rewards, and which
one the judge prefers.

    python -m prefopt.compare run=runs/A run=runs/B
    python -m prefopt.compare run=runs/A run=runs/B instructions=questions.jsonl judge=gpt4o_mini

It is `prefopt.alpaca run=runs/A baseline=runs/B` with other defaults, and a page beside its record.
"""

import sys
from pathlib import Path

from omegaconf import DictConfig

from prefopt.cli.program import program, refuse_launcher_without_multirun
from prefopt.config.parse import parse
from prefopt.errors import UserError
from prefopt.evaluation.alpaca import answers_of_baseline, evaluate_checkpoint, prepare_comparison
from prefopt.evaluation.config import AlpacaConfig
from prefopt.reporting.compare import page
from prefopt.tracking.policies import exported_policies
from prefopt.tracking.record import read_result, record_of
from prefopt.utils.files import atomic_write
from prefopt.utils.store import read_sealed_lines


@program("compare", AlpacaConfig)
def compare(cfg: DictConfig) -> None:
    refuse_launcher_without_multirun()
    config = parse(cfg, AlpacaConfig)
    if config.run is None or config.model_outputs is not None:
        raise UserError("two runs are compared: python -m prefopt.compare run=A run=B")
    if config.instructions is None:
        data = record_of(config.run)["config"]["dataset"]
        if not data["heldout"]:
            raise UserError(f"{config.run} has no held-out rows of one file: name the questions by instructions=FILE")
        config.instructions, config.split = data["heldout"], data["heldout_split"]
    if config.checkpoints != "final":
        raise UserError("a comparison is of the final policies: leave checkpoints out.")
    judge, questions = prepare_comparison(config)
    (checkpoint,) = exported_policies(config.run, "final")
    folder = evaluate_checkpoint(
        config, judge, checkpoint, questions, lambda: answers_of_baseline(config, questions), {}
    )
    annotations, _ = read_sealed_lines(folder / "annotations.json")
    output = folder / "page.html"
    atomic_write(output, page(read_result(folder / "record.json"), annotations))
    print(output)


def main() -> None:
    """The second run= on the command line is the baseline."""
    runs = [i for i, argument in enumerate(sys.argv) if argument.startswith("run=")]
    if len(runs) > 2:
        print(
            "error: two runs are compared, and run= is given more often: python -m prefopt.compare run=A run=B",
            file=sys.stderr,
        )
        sys.exit(2)
    if len(runs) == 2:
        sys.argv[runs[1]] = f"baseline={Path(sys.argv[runs[1]].removeprefix('run='))}"
    compare()


if __name__ == "__main__":
    main()
