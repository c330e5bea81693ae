"""What `prefopt sample` writes: the rows of its prompts, each with the responses to it."""

import logging
from pathlib import Path

from prefopt.config.hardware import resolve_hardware
from prefopt.data.fields import responses_of
from prefopt.data.sources import Row, write_rows
from prefopt.errors import UserError
from prefopt.generation.config import SampleConfig, check_sample
from prefopt.generation.responses import GenerationRequest, generate_resumable, read_prompts
from prefopt.tracking.process import output_lock
from prefopt.utils.distributed import is_main_process, process_group
from prefopt.utils.files import check_output

log = logging.getLogger(__name__)


def run_pending(config: SampleConfig, **_: str) -> None:
    """A job of a sweep: `sample`, unless the output is there."""
    if Path(config.output).is_file():
        log.info(f"{config.output} is there, skipped (remove it to draw again)")
    else:
        sample(config)


def sample(config: SampleConfig) -> None:
    """Write the output, going on from a stopped call. Raises UserError for what cannot be sampled, and Interrupted."""
    check_sample(config)
    output = check_output(config.output, config.prompts)
    resolve_hardware(config)
    rows, prompts = read_prompts(config.prompts, config.split)
    earlier = [earlier_responses(config, number, row) for number, row in enumerate(rows, start=1)]
    output.parent.mkdir(parents=True, exist_ok=True)  # fails now rather than after an hour of sampling
    partial = output.with_name(f"{output.name}.partial")
    request = GenerationRequest(
        model=config.model,
        prompts=prompts,
        sampling=config.sampling,
        samples_per_prompt=config.samples_per_prompt,
        seed=config.seed,
        backend=config.backend,
        server=config.server,
        server_log=output.with_name(f"{output.name}.server.log"),
        device=config.device,
        precision=config.precision,
    )
    with process_group(config.device), output_lock(output):
        responses, _ = generate_resumable(request, partial)
        if is_main_process():
            write_rows(output, [joined(*parts) for parts in zip(rows, responses, earlier, strict=True)])
            partial.unlink()
    log.info(f"wrote {len(rows)} rows of {config.samples_per_prompt} responses to {output}")


def earlier_responses(config: SampleConfig, number: int, row: Row) -> Row:
    """{"responses", "finished"} that the output keeps of an input row. Raises UserError for a row without any."""
    if not config.keep_responses:
        return {"responses": [], "finished": []}
    try:
        _, finished = responses_of(row)
    except (KeyError, ValueError) as error:
        raise UserError(
            f"keep_responses=true, and {config.prompts}, row {number}, has no responses to keep: {error}"
        ) from None
    return {"responses": row["responses"], "finished": finished}


def joined(row: Row, new: Row, earlier: Row) -> Row:
    """The row with the new responses before the earlier ones. Rewards that it has belong to other responses and go."""
    others = {key: value for key, value in row.items() if not (key.startswith("rewards") and "responses" in row)}
    return others | {key: new[key] + earlier[key] for key in ("responses", "finished")}
