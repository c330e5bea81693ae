"""Sample responses from a policy: one JSON row per prompt, with `samples_per_prompt` responses.

    python -m prefopt.sample prompts=prompts.jsonl output=samples.jsonl.gz samples_per_prompt=8
    python -m prefopt.sample -m launcher=slurm model=hub model.path=A,B prompts=p.jsonl 'output=${model.name}.jsonl'

An input row needs the field `prompt` (a text or messages). The output row has all fields of the input row, and the
lists `responses` (texts) and `finished` (false where the token limit cut the response off). `prefopt.score` adds
`rewards`; those of earlier responses are left out. With `keep_responses=true` the responses that a row has already, of
another model or of a person, come after the new ones.

Responses are kept in OUTPUT.partial as they come. The same command continues a stopped one, and writes the same file,
also with another number of processes: torchrun --nproc-per-node=8 -m prefopt.sample shares the batches over 8 GPUs.
A sweep leaves outputs as they are that are there already.
"""

from pathlib import Path

from omegaconf import DictConfig

from prefopt.cli.multirun import Point
from prefopt.cli.program import program, refuse_launcher_without_multirun
from prefopt.config.parse import parse
from prefopt.generation.config import SampleConfig, check_sample
from prefopt.generation.sampled import sample
from prefopt.launch.base import Launcher, SweepJob
from prefopt.launch.sweep import Sweep
from prefopt.utils.files import check_output


def plan_job(point: Point, label: str, config: SampleConfig, _: Launcher, folder: Path) -> SweepJob:
    """A sweep's job for one point. Raises UserError for a point that cannot be sampled."""
    check_sample(config)
    check_output(config.output, config.prompts)
    return SweepJob(point.overrides, label, config, config.model, folder)


@program("sample", SampleConfig, Sweep("sample", SampleConfig, plan_job, log_lines=1))
def main(cfg: DictConfig) -> None:
    refuse_launcher_without_multirun()
    sample(parse(cfg, SampleConfig))


if __name__ == "__main__":
    main()
