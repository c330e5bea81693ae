"""Make the laboratory's world: a grammar of short reviews of which everything is known exactly.

    python -m prefopt.lab
    python -m prefopt.lab output=elsewhere seed=1

`output` gets model/ (a Llama of 170,000 parameters with random weights, and its tokenizer), prompts.jsonl.gz,
reviews.jsonl.gz (for supervised fine-tuning), and tasks/ for `prefopt harness`. What is there and whole is left as it
is. What the world is, and what to do in it: docs/laboratory.md.
"""

import json
from dataclasses import dataclass
from pathlib import Path

from omegaconf import MISSING, DictConfig

from prefopt.cli.program import program
from prefopt.config.parse import parse
from prefopt.errors import UserError
from prefopt.utils.files import check_folder
from prefopt.utils.fingerprint import fingerprint
from prefopt.utils.store import opened
from prefopt.world import grammar


@dataclass
class LabConfig:
    """The keys of `python -m prefopt.lab`. conf/lab.yaml has their defaults and explains them."""

    output: str = MISSING
    seed: int = MISSING


@program("lab", LabConfig)
def main(cfg: DictConfig) -> None:
    config = parse(cfg, LabConfig)
    check_folder("output", config.output)
    output = Path(config.output)

    from prefopt.world import files  # imports torch: bad input is refused before

    identity = {"seed": config.seed, "definition": fingerprint([], grammar, files)[:16]}

    def make(folder: Path) -> None:
        files.make_files(folder, config.output, config.seed)
        (folder / "world.json").write_text(json.dumps(identity | grammar.facts(), indent=2) + "\n")

    output.parent.mkdir(parents=True, exist_ok=True)
    if output.is_dir() and not (output / "world.json").is_file() and any(output.iterdir()):
        raise UserError(f"output={output} holds other files. Give an empty or a new folder.")
    opened(output, "the laboratory's world", make)
    found = json.loads((output / "world.json").read_text())
    if {key: found[key] for key in identity} != identity:
        raise UserError(
            f"{output} is the world of seed={found['seed']}, or of another version of prefopt. Remove it, or give "
            "another output."
        )
    print(output)
    for fact, value in grammar.facts().items():
        print(f"  {fact}: {value:.4f}")


if __name__ == "__main__":
    main()
