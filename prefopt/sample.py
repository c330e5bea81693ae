"""Draw n responses per prompt from a policy, and write one JSON row per prompt.

    python -m prefopt.sample prompts=prompts.jsonl output=samples.jsonl.gz samples_per_prompt=8

A prompt row needs the field `prompt` (text or messages); its other fields are carried over. The row that comes out also
holds `responses` (texts) and `finished` (did the response end by itself?); `prefopt.score` adds `rewards`.

What is drawn is kept in OUTPUT.partial as it comes, so the same command goes on where a stopped one was, and ends with
the same file.
"""

from omegaconf import DictConfig

from prefopt.cli.program import program
from prefopt.config.hardware import resolve_hardware
from prefopt.config.parse import parse
from prefopt.data.sources import write_rows
from prefopt.generation.config import SampleConfig, check_sample
from prefopt.generation.responses import generate_resumable, read_prompts
from prefopt.utils.console import say
from prefopt.utils.files import check_output


@program("sample", SampleConfig)
def main(cfg: DictConfig) -> None:
    config = parse(cfg, SampleConfig)
    check_sample(config)
    output = check_output(config.output, config.prompts)
    resolve_hardware(config)
    rows, prompts = read_prompts(config.prompts, config.split)
    output.parent.mkdir(parents=True, exist_ok=True)  # fails now rather than after an hour of sampling
    partial = output.with_name(f"{output.name}.partial")
    n, where = config.samples_per_prompt, (config.backend, config.device, config.precision)
    drawn, _ = generate_resumable(config.model, prompts, config.sampling, n, config.seed, *where, partial)
    write_rows(output, [row | samples for row, samples in zip(rows, drawn, strict=True)])
    partial.unlink()
    say(f"wrote {len(rows)} rows of {n} responses to {output}")


if __name__ == "__main__":
    main()
