"""Run one job of a sweep from its folder, as the launchers start it:

    python -m prefopt.job FOLDER

FOLDER/job.json holds the resolved config, so nothing is composed again. Exit code 0 means finished, and 75 interrupted:
saved, and to be started again. Any other means failed: the traceback is then on stderr and in record.json.

`python -m prefopt.job --warm FOLDER` makes the imports of that job, and forks for every job that launcher=local asks
for (prefopt/launch/warm.py).
"""

import contextlib
import sys
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from prefopt.cli.program import exit_code
from prefopt.config.parse import parse
from prefopt.errors import Interrupted, UserError
from prefopt.evaluation.config import AlpacaConfig, ArenaConfig, HarnessConfig, MtbenchConfig, RewardBenchConfig
from prefopt.generation.config import SampleConfig
from prefopt.launch import warm
from prefopt.reporting.run_curves import write_curves
from prefopt.rewards.config import ScoreConfig
from prefopt.tracking.process import acquire_lock, process_info, release_lock
from prefopt.tracking.provenance import check_frozen_code
from prefopt.tracking.record import read_json, read_record, update_record
from prefopt.training.config import OnlineConfig, TrainConfig
from prefopt.utils.console import configure_logging
from prefopt.utils.distributed import is_main_process
from prefopt.utils.redact import RedactingStream
from prefopt.utils.signals import install_handlers

# What a job imports when it runs, beyond this module: those of a run, and those of the other programs.
RUN = """
prefopt.training.build prefopt.training.export prefopt.training.loop prefopt.training.model_card prefopt.data.hub
transformers.generation.utils transformers.models.llama.modeling_llama
matplotlib.backends.backend_agg matplotlib.pyplot
"""
PROGRAMS = {
    "train": "",
    "online": "prefopt.training.online prefopt.generation.responses prefopt.generation.sampler prefopt.rewards.rows",
    "harness": "prefopt.evaluation.harness lm_eval.evaluator lm_eval.models.huggingface lm_eval.tasks",
    "alpaca": "prefopt.evaluation.alpaca prefopt.generation.responses prefopt.generation.sampler",
    "mtbench": "prefopt.evaluation.mtbench prefopt.generation.sampler",
    "arena": "prefopt.evaluation.arena prefopt.generation.sampler",
    "reward_bench": "prefopt.evaluation.reward_bench",
    "sample": "prefopt.generation.sampled prefopt.generation.sampler",
    "score": "prefopt.rewards.scored",
}


def warm_up(folder: Path) -> None:
    """Import what the job in `folder` will import, and read once what its model is identified by. No tensor is made."""
    frozen = read_json(folder / "job.json")
    for module in f"{RUN} {PROGRAMS[frozen['program']]}".split():
        with contextlib.suppress(ImportError):  # of a package that is not installed, or an extra: the job says so
            import_module(module)
    if frozen["program"] == "train":
        from prefopt.training.setup import model_parts

        with contextlib.suppress(Exception):  # the job says what is wrong
            model_parts(parse(OmegaConf.create(frozen["config"]), TrainConfig))


def run(folder: Path) -> None:
    """Run the job in `folder`, and keep its status in its record.

    Raises UserError where another process works on it, or the frozen code or the data files have changed since it was
    submitted, and Interrupted where it was asked to stop and has saved.
    """
    install_handlers()  # first: what follows takes seconds, in which a signal would end the process
    if is_main_process():
        acquire_lock(folder)
    try:
        _run_locked(folder)
        write_curves(folder)
    finally:
        release_lock(folder)


def _run_locked(folder: Path) -> None:
    if read_record(folder)["status"] == "finished":  # its node was lost before Slurm knew of it, and it was requeued
        return
    if is_main_process():
        update_record(folder, status="running", **process_info())
    frozen = read_json(folder / "job.json")
    try:
        check_frozen_code(Path(frozen["code"]))
        (_train if frozen["program"] == "train" else _run_pending)(folder, frozen)
    except (Interrupted, KeyboardInterrupt):
        if frozen["program"] != "train" and is_main_process():  # a training run has recorded it itself
            update_record(folder, status="interrupted")
        raise
    except BaseException as error:  # SystemExit too: even with code 0 it ends a job that has not finished
        if read_record(folder)["status"] == "finished":  # it was only tidying up
            raise
        update_record(folder, status="failed", error=traceback.format_exc())
        if not isinstance(error, Exception):
            raise RuntimeError(f"{type(error).__name__} ended the job before it had finished") from error
        raise


def _train(folder: Path, frozen: dict[str, Any]) -> None:
    from prefopt.training.setup import prepare_run, run

    planned = prepare_run(parse(OmegaConf.create(frozen["config"]), TrainConfig))
    if planned.run.name != folder.name:
        raise UserError(
            f"{folder}: the data files have changed since this was submitted (they now belong to "
            f"{planned.run.name}). Bring them back, or submit the sweep again."
        )
    run(planned, command=frozen["command"], code=frozen["code"])


def _run_pending(folder: Path, frozen: dict[str, Any]) -> None:
    """Do what is left of a job of a program other than train."""
    schema: type[Any]
    match frozen["program"]:  # imported one by one: they take seconds, and need packages that may not be installed
        case "online":
            from prefopt.training.online import run_pending

            schema = OnlineConfig
        case "harness":
            from prefopt.evaluation.harness import run_pending  # type: ignore[assignment]

            schema = HarnessConfig
        case "alpaca":
            from prefopt.evaluation.alpaca import run_pending  # type: ignore[assignment]

            schema = AlpacaConfig
        case "mtbench":
            from prefopt.evaluation.mtbench import run_pending  # type: ignore[assignment]

            schema = MtbenchConfig
        case "arena":
            from prefopt.evaluation.arena import run_pending  # type: ignore[assignment]

            schema = ArenaConfig
        case "reward_bench":
            from prefopt.evaluation.reward_bench import run_pending  # type: ignore[assignment]

            schema = RewardBenchConfig
        case "sample":
            from prefopt.generation.sampled import run_pending  # type: ignore[assignment]

            schema = SampleConfig
        case "score":
            from prefopt.rewards.scored import run_pending  # type: ignore[assignment]

            schema = ScoreConfig
        case other:
            raise UserError(f"{folder}/job.json: there is no program {other!r} whose jobs can be run.")
    config: Any = parse(OmegaConf.create(frozen["config"]), schema)
    place = run_pending(config, command=frozen["command"], code=frozen["code"])
    if frozen["program"] == "online":  # whose folder is not the job's
        write_curves(place)
    if is_main_process():
        update_record(folder, status="finished")


if __name__ == "__main__":
    is_warm = sys.argv[1] == warm.FLAG
    if is_warm:
        warm.serve(lambda: warm_up(Path(sys.argv[2])))  # goes on here in every fork, with the arguments of its job
    sys.stdout, sys.stderr = RedactingStream(sys.stdout), RedactingStream(sys.stderr)
    configure_logging()
    code = exit_code(lambda: run(Path(sys.argv[1])), [])
    if is_warm:
        warm.leave(code)
    sys.exit(code)
