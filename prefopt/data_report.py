"""Look at a data set before training on it: counts, defects, lengths, rewards, overlaps, and what the loss sees.

    python -m prefopt.data_report dataset=sentiment_offline

Only the tokenizer of the model is loaded. Lengths are measured before anything is cut or dropped for its length; what
is said about training (counts, examples, shared prompts) holds within the limits.
"""

import logging
import shlex
import sys
from pathlib import Path

from omegaconf import DictConfig

from prefopt.cli.multirun import overrides
from prefopt.cli.program import program
from prefopt.config.parse import parse
from prefopt.data.cache import Limits, prepare_dataset, tokenizer_digest
from prefopt.data.dataset import check_dataset, has_heldout, split_digest
from prefopt.data.dataset_path import replace_path
from prefopt.errors import UserError
from prefopt.reporting.config import DataReportConfig
from prefopt.reporting.data import (
    UNLIMITED,
    count_sections,
    draw,
    evaluation_keys,
    examples,
    layout_section,
    length_sections,
    long_csv,
    markdown,
    overlap_section,
    reward_section,
    show,
    training_command,
)
from prefopt.utils.files import atomic_write, check_folder

log = logging.getLogger("prefopt.data_report")


@program("data_report", DataReportConfig, rewrite=replace_path)
def main(cfg: DictConfig) -> None:
    config = parse(cfg, DataReportConfig)
    for key in ("max_prompt_tokens", "max_completion_tokens"):
        if getattr(config, key) < 1:
            raise UserError(f"{key} must be at least 1, is {getattr(config, key)}")
    check_folder("output", config.output)
    check_dataset(config.dataset)
    for split in ("train", "heldout") if has_heldout(config.dataset) else ("train",):
        split_digest(config.dataset, split)  # of files that are there
    evaluation = {path: evaluation_keys(path) for path in config.evaluation_prompts}

    from prefopt.models.load import load_tokenizer  # imports torch: bad input is refused before

    tokenizer = load_tokenizer(config.model)
    log.info("within the length limits:")
    limits = Limits(config.max_prompt_tokens, config.max_completion_tokens)
    trained = prepare_dataset(config.dataset, tokenizer, limits, lambda split, rewards: None)
    log.info("of any length:")
    splits = prepare_dataset(config.dataset, tokenizer, UNLIMITED, lambda split, rewards: None)
    sections = [
        *count_sections(config, trained),
        *length_sections(config, splits, trained),
        *reward_section(splits),
        *overlap_section(config, trained, evaluation),
    ]
    seen = examples(tokenizer, trained["train"])
    training = training_command(overrides(), trained["train"].counts["kind"])
    layout = layout_section(config)
    output = Path(config.output)
    output.mkdir(parents=True, exist_ok=True)
    figures = draw(config, splits, output)
    digests = ", ".join(f"{name} {split_digest(config.dataset, name)[:16]}" for name in splits)
    document = [
        f"# The data set {config.dataset.name}",
        f"Made by `python -m prefopt.data_report {shlex.join(sys.argv[1:])}`. Digests of the data: {digests}; "
        f"of the tokenizer of {config.model.path}: {tokenizer_digest(tokenizer)[:16]}.",
        f"To train on it: `{training}`",
        *map(markdown, (layout, *sections)),
        "## Histograms",
        *(f"![{file.stem}]({file.name})" for file in figures if file.suffix == ".png"),
        "## Three rows of train\n\nWhat the loss sees stands between ⟦ and ⟧.",
        seen,
    ]
    atomic_write(output / "report.md", "\n\n".join(document) + "\n")
    atomic_write(output / "report.csv", long_csv(sections))
    print(f"{seen}\n")
    for section in (layout, *sections):
        show(section)
    print(f"To train on it:\n  {training}\n")
    for file in (output / "report.md", output / "report.csv", *figures):
        print(file)


if __name__ == "__main__":
    main()
