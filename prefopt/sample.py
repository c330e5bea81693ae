"""Draw n responses per prompt from a policy, score them with an oracle, and write one JSON row per prompt.

    python -m prefopt.sample prompts=prompts.jsonl output=samples.jsonl.gz samples_per_prompt=8

A prompt row needs the field `prompt` (text or messages); its other fields are carried over. The row that comes out
also holds `responses` (texts), `finished` (did the response end by itself?) and, with an oracle, `rewards`.
"""

import gzip
import json
from pathlib import Path

from omegaconf import DictConfig

from prefopt import UserError
from prefopt.config import SampleConfig, build, check_sample, parse, resolve_hardware
from prefopt.data.formats import as_messages
from prefopt.data.sources import read_rows
from prefopt.paths import write_whole
from prefopt.program import program
from prefopt.progress import say


@program("sample")
def main(cfg: DictConfig) -> None:
    config = parse(cfg, SampleConfig)
    check_sample(config)
    resolve_hardware(config)
    rows, prompts = [], []
    for where, row in read_rows(config.prompts):
        try:
            prompts.append(as_messages(row["prompt"]))
        except KeyError:
            raise UserError(f"{where} has no field 'prompt'.") from None
        except ValueError as error:
            raise UserError(f"{where}: {error}.") from None
        rows.append(row)
    output = Path(config.output)
    output.parent.mkdir(parents=True, exist_ok=True)  # fails now rather than after an hour of sampling

    # Imported here, so that bad input is refused before transformers is loaded.
    from prefopt.generate import sample
    from prefopt.logps import autocast
    from prefopt.models.load import load_model, load_tokenizer
    from prefopt.posthoc.oracle import Oracle

    oracle = build(config.oracle, Oracle, "oracle") if config.oracle else None
    tokenizer = load_tokenizer(config.model)
    model = load_model(config.model, config.device)
    with autocast(model.device, config.precision):
        samples = sample(model, tokenizer, prompts, config.sampling, config.seed, config.samples_per_prompt, True)
    for row, prompt, drawn in zip(rows, prompts, samples, strict=True):
        row["responses"] = [s.text for s in drawn]
        row["finished"] = [s.finished for s in drawn]
        row.pop("rewards", None)
        if oracle:
            row["rewards"] = [round(oracle(prompt, s.text), 6) for s in drawn]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    # mtime=0, so that the same samples give the same file.
    write_whole(output, gzip.compress(lines, mtime=0) if output.suffix == ".gz" else lines)
    say(f"wrote {len(rows)} rows of {config.samples_per_prompt} responses to {output}")


if __name__ == "__main__":
    main()
