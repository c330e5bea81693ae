"""Sample responses from a policy: one JSON row per prompt, with `samples_per_prompt` responses.

    python -m prefopt.sample prompts=prompts.jsonl output=samples.jsonl.gz samples_per_prompt=8

An input row needs the field `prompt` (a text or messages). The output row has all fields of the input row, and the
lists `responses` (texts) and `finished` (false where the token limit cut the response off). `prefopt.score` adds
`rewards`.

Responses are kept in OUTPUT.partial as they come. The same command continues a stopped one, and writes the same file,
also with another number of processes: torchrun --nproc-per-node=8 -m prefopt.sample shares the batches over 8 GPUs.
"""

import logging

from omegaconf import DictConfig

from prefopt.cli.program import program
from prefopt.config.hardware import resolve_hardware
from prefopt.config.parse import parse
from prefopt.data.sources import write_rows
from prefopt.generation.config import SampleConfig, check_sample
from prefopt.generation.responses import GenerationRequest, generate_resumable, read_prompts
from prefopt.tracking.process import output_lock
from prefopt.utils.distributed import is_main_process, process_group
from prefopt.utils.files import check_output

log = logging.getLogger("prefopt.sample")


@program("sample", SampleConfig)
def main(cfg: DictConfig) -> None:
    config = parse(cfg, SampleConfig)
    check_sample(config)
    output = check_output(config.output, config.prompts)
    resolve_hardware(config)
    rows, prompts = read_prompts(config.prompts, config.split)
    output.parent.mkdir(parents=True, exist_ok=True)  # fails now rather than after an hour of sampling
    partial = output.with_name(f"{output.name}.partial")
    request = GenerationRequest(
        model=config.model,
        prompts=prompts,
        sampling=config.sampling,
        samples_per_prompt=config.samples_per_prompt,
        seed=config.seed,
        backend=config.backend,
        device=config.device,
        precision=config.precision,
    )
    with process_group(config.device), output_lock(output):
        responses, _ = generate_resumable(request, partial)
        if is_main_process():
            write_rows(output, [row | new for row, new in zip(rows, responses, strict=True)])
            partial.unlink()
    log.info(f"wrote {len(rows)} rows of {config.samples_per_prompt} responses to {output}")


if __name__ == "__main__":
    main()
