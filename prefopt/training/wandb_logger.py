"""wandb as a logger: a run of wandb for all attempts of a run, offline where its server cannot be reached."""

import itertools
import json
import logging
import os
import shlex
from pathlib import Path
from typing import Any

from prefopt.config.schema import WandbConfig
from prefopt.errors import UserError
from prefopt.tracking.metrics import item_file, numbers, read_metrics
from prefopt.tracking.run import Run
from prefopt.utils.redact import redact

log = logging.getLogger(__name__)

INIT_SECONDS = 30  # until wandb's server must have answered
SAMPLES = 64  # most rows of a table of samples


def check_wandb(config: WandbConfig) -> None:
    """Raise UserError where the package or the key is missing, or where the environment says otherwise than `config`.

    What `config` leaves null the environment decides: WANDB_ENTITY, WANDB_RUN_GROUP and WANDB_TAGS.
    """
    try:
        import wandb
    except ImportError:
        raise UserError("logger=wandb needs the package wandb: pip install -e '.[wandb]'") from None

    expected = {"WANDB_PROJECT": config.project, "WANDB_MODE": config.mode, "WANDB_ENTITY": config.entity}
    expected |= {"WANDB_RUN_GROUP": config.group, "WANDB_TAGS": ",".join(config.tags)}
    others = [name for name, value in expected.items() if value and os.environ.get(name, value) != value]
    # A run has its own folder, name and id.
    others += [name for name in ("WANDB_DIR", "WANDB_NAME", "WANDB_RUN_ID", "WANDB_RESUME") if os.environ.get(name)]
    if others:
        said = ", ".join(f"{name}={os.environ[name]}" for name in others)
        raise UserError(
            f"the environment says {said}, which is not what logger.wandb says: unset it. Project, mode, entity, group "
            "and tags are keys of logger.wandb; the files lie in the run's folder."
        )
    if config.mode == "online":
        try:
            problem = None if wandb.login(prompt=False, verify=False) else "there is none"
        except Exception as error:  # a key of the wrong form
            problem = str(error)
        if problem:
            raise UserError(
                f"logger.wandb.mode=online needs wandb's key: {redact(problem)}. Run `wandb login`, set WANDB_API_KEY, "
                "or take logger.wandb.mode=offline."
            )


class WandbLogger:
    """A run of wandb. Raises what wandb raises where it does not start."""

    def __init__(self, run: Run, config: WandbConfig):
        self.run, self.wandb = run, start_wandb(run, config)
        # An offline run starts anew with each attempt, and of a killed one the last rows may be missing.
        for row in read_metrics(run.metrics_file):
            self.log(row["split"], row["step"], row)

    def log(self, split: str, step: int, metrics: dict[str, Any]) -> None:
        if step < self.wandb.step:  # it has them
            return
        values: dict[str, Any] = {f"{split}/{name}": value for name, value in numbers(metrics).items()}
        if split == "heldout" and (rows := read_samples(item_file(self.run.folder, "samples", step))):
            import wandb

            values["heldout/samples"] = wandb.Table(columns=["prompt", "response", "reward"], data=rows)
        self.wandb.log(values, step=step)

    def close(self) -> None:
        try:
            self.wandb.finish()
        finally:
            if self.wandb.offline:
                folder = shlex.quote(str(Path(self.wandb.dir).parent))
                log.info(f"  wandb is offline; to upload this run: wandb sync {folder}")


def read_samples(file: Path) -> list[list[Any]]:
    """The first SAMPLES rows [prompt, response, reward] of a file in samples/; none without it. The reward is None
    where nothing scores the samples."""
    if not file.is_file():
        return []
    with file.open() as lines:
        rows = [json.loads(line) for line in itertools.islice(lines, SAMPLES)]
    return [[prompt_text(row["prompt"]), row["response"], row.get("reward")] for row in rows]


def prompt_text(prompt: list[dict[str, str]]) -> str:
    """A prompt as one text: that of its only message, or each message after its role."""
    if len(prompt) == 1:
        return prompt[0]["content"]
    return "\n\n".join(f"{message['role']}: {message['content']}" for message in prompt)


def start_wandb(run: Run, config: WandbConfig) -> Any:
    """wandb's run. Where wandb cannot be reached it is an offline one, and a line says so."""
    import wandb

    settings: dict[str, Any] = {
        "project": config.project,
        "entity": config.entity,
        "group": config.group,
        "tags": config.tags or None,
        "name": run.name,
        # One id for all attempts of a run: a resumed run adds to the same wandb run.
        "id": run.id,
        "resume": "allow",
        "dir": run.folder,
        "config": run.record["config"],
        "settings": wandb.Settings(silent=True, init_timeout=INIT_SECONDS),
    }
    try:
        return wandb.init(mode=config.mode, **settings)  # type: ignore[arg-type]  # checked with the config
    except Exception as error:
        if config.mode == "offline":
            raise
        reason = (redact(str(error)).strip() or type(error).__name__).splitlines()[0]
    log.warning(f"  wandb cannot be reached, so its rows are kept offline in the run's folder: {reason}")
    wandb.teardown()  # its service process holds the run's id still
    return wandb.init(mode="offline", **settings)
