"""The frame of every command-line program: Hydra composes, errors become messages and exit codes."""

import errno
import logging
import os
import re
import sys
import tempfile
import traceback
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from hydra import version
from hydra._internal.utils import _run_hydra, get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from prefopt.cli.help import show, wants_help
from prefopt.cli.hints import refusal
from prefopt.cli.hydra_guard import check_overrides, guarded
from prefopt.cli.multirun import SWEEP_FOLDER, Point, files_of_groups, overrides, sweep_folder
from prefopt.config.parse import NO_KEYS, drop_left_over, drop_left_over_of_files, register
from prefopt.errors import Interrupted, UserError
from prefopt.utils.console import configure_logging
from prefopt.utils.distributed import is_main_process
from prefopt.utils.files import ROOT
from prefopt.utils.memory import OTHERS, is_out_of_memory
from prefopt.utils.os_errors import ADVICE, explain
from prefopt.utils.redact import RedactingStream, find_secret
from prefopt.utils.signals import EXIT_CODE, repeat_lost_interrupts

LOCAL_RANK = re.compile(r"--local[_-]rank=(\d+)")
Launch = Callable[[list[Point], Path, bool], int]
Rewrite = Callable[[list[str], str], list[str]]


def program(
    config_name: str, schema: type, launch: Launch | None = None, rewrite: Rewrite | None = None
) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Decorator that makes a command-line program of a function of one config, composed from
    `conf/<config_name>.yaml` and checked against `schema`.

    A UserError, or a command line that Hydra cannot compose, becomes one message on stderr and exit code 2. Any other
    exception becomes a traceback and exit code 1.

    In a multirun with `launch`, Hydra composes all points, and `launch(points, folder of the sweep, dry_run)` starts
    the jobs and returns the exit code. In a multirun without, the points run one after the other in this process. A
    failing one does not stop the others; the failed ones are named at the end.

    `rewrite(arguments, config_name)` gives the arguments that Hydra composes instead of the user's; it may raise
    UserError.
    """

    def decorate(job: Callable[[DictConfig], None]) -> Callable[[], None]:
        def main() -> None:
            sys.exit(run(config_name, schema, job, launch, rewrite, sys.argv[1:]))

        return main

    return decorate


def run(
    config_name: str,
    schema: type,
    job: Callable[[DictConfig], None],
    launch: Launch | None,
    rewrite: Rewrite | None,
    arguments: list[str],
) -> int:
    """Run a program on the command line `arguments`; the exit code. The other parameters are those of `program`."""
    install_redaction()
    configure_logging()
    repeat_lost_interrupts()
    arguments = take_local_rank(arguments)
    if secret := find_secret("\n".join(arguments)):  # first of all, so that nothing shows it
        return _refuse(f"the command line holds {secret}. {NO_KEYS}")
    try:
        if rewrite:
            arguments = rewrite(arguments, config_name)
        command_line = parse_multirun_args(arguments, launches=launch is not None)
    except UserError as error:
        return _refuse(str(error))
    if wants_help(arguments):
        return show(config_name, arguments)

    quiet_libraries()
    register(schema)
    task = Task(job)
    try:
        compose_points(config_name, command_line.for_hydra, task)
        if launch and task.points:
            points, folder = task.points, command_line.folder or sweep_folder(task.points[0].cfg)
            task.code = exit_code(lambda: launch(points, folder, command_line.dry_run), task.failures)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    except UserError as error:
        return _refuse(str(error))
    except Exception as error:  # of composing: `exit_code` lets through nothing that a job raises
        print(f"error: {refusal(error, arguments)}", file=sys.stderr)
        print(f"All groups and keys: python -m prefopt.{config_name} --help", file=sys.stderr)
        return 2

    # A launcher has said itself what became of its jobs; of a single job, its own message is enough.
    if not task.points and (len(task.failures) > 1 or (task.failures and command_line.for_hydra.multirun)):
        print("failed:", *task.failures, sep="\n  ", file=sys.stderr)
    return task.code


def take_local_rank(arguments: list[str]) -> list[str]:
    """The arguments without the --local_rank=N that the `deepspeed` launcher puts before them; LOCAL_RANK says it
    then."""
    others = []
    for argument in arguments:
        if found := LOCAL_RANK.fullmatch(argument):
            os.environ.setdefault("LOCAL_RANK", found[1])
        else:
            others.append(argument)
    return others


def install_redaction() -> None:
    """From now on no secret is printed by this process (`utils.redact`)."""
    sys.stdout, sys.stderr = RedactingStream(sys.stdout), RedactingStream(sys.stderr)


def quiet_libraries() -> None:
    """Keep Hydra and the hub's client from printing what `run` says in its own way, or nobody needs."""
    for client in ("httpx", "httpx2"):  # Hydra's root logger would show a line for each request to the hub
        logging.getLogger(client).setLevel(logging.WARNING)
    logging.getLogger("hydra.utils").setLevel(logging.CRITICAL)  # what it cannot import, it also raises
    # With it, Hydra raises what it cannot compose; without, it prints that and ends the process.
    os.environ["HYDRA_FULL_ERROR"] = "1"


@dataclass(frozen=True)
class CommandLine:
    """What a command line asks for.

    `for_hydra`: the arguments as Hydra's parser returns them, such as `multirun` and the list `overrides`.
    `dry_run`: --dry-run was given. `folder`: the sweep's folder, where the user names one.
    """

    for_hydra: Namespace
    dry_run: bool
    folder: Path | None


def parse_multirun_args(arguments: list[str], launches: bool) -> CommandLine:
    """Take apart a command line. `launches` is whether the program starts the jobs of a sweep itself.

    Raises UserError for what would make Hydra run code, and for --dry-run without a sweep to show. Ends the process
    with code 2 for a flag that is none.
    """
    # Intermixed: flags may stand between the overrides.
    parsed = get_args_parser().parse_intermixed_args([a for a in arguments if a != "--dry-run"])
    if parsed.experimental_rerun is not None:
        raise UserError("--experimental-rerun is not taken: its file is a pickle, which is code. Give the overrides.")
    if parsed.config_path is not None:
        raise UserError("--config-path is not taken: --config-dir FOLDER adds a folder of configs to our own.")
    check_overrides(parsed.overrides)
    dry_run = "--dry-run" in arguments
    if dry_run and not (launches and parsed.multirun):
        raise UserError("--dry-run shows the jobs of a sweep: python -m prefopt.train -m ... --dry-run")

    folders = [override for override in parsed.overrides if override.startswith(SWEEP_FOLDER)]
    if parsed.multirun:
        # Hydra would write into the sweep's folder before anything is composed: `compose_points` gives another.
        parsed.overrides = [override for override in parsed.overrides if override not in folders]
    return CommandLine(parsed, dry_run, Path(folders[-1].removeprefix(SWEEP_FOLDER)) if folders else None)


@dataclass
class Task:
    """What Hydra calls with what it has composed, and what became of it: the worst exit code, and a line a failure."""

    job: Callable[[DictConfig], None]
    points: list[Point] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    code: int = 0

    def run(self, composed: DictConfig | list[Point]) -> None:
        """Run the job with a config; all points of a sweep, which `hydra_plugins` hands in at once, are kept."""
        if isinstance(composed, list):
            for point in composed:
                drop_left_over(point.cfg, point.overrides)
            self.points = composed
            return
        drop_left_over_of_files(composed, files_of_groups(HydraConfig.get()))
        drop_left_over(composed, overrides())
        code = exit_code(lambda: self.job(composed), self.failures)
        self.code = max(self.code, code, key=(0, EXIT_CODE, 2, 1).index)  # from the best to the worst


def compose_points(config_name: str, arguments: Namespace, task: Task) -> None:
    """Have Hydra compose `conf/<config_name>.yaml` and call `task.run`. Raises what Hydra raises for a command line
    that it cannot compose."""
    version.setbase("1.3")
    with tempfile.TemporaryDirectory() as scratch, guarded(config_name):
        if arguments.multirun:
            arguments.overrides.append(f"{SWEEP_FOLDER}{scratch}")
        # As hydra.main calls it, which parses sys.argv itself, and takes no flags between overrides.
        _run_hydra(arguments, get_args_parser(), task.run, str(ROOT / "conf"), config_name)


def exit_code(job: Callable[[], int | None], failures: list[str]) -> int:
    """Call `job` and return its exit code: what it returns, or 0 for None.

    An exception is printed on stderr, and its first line is added to `failures`. The code is 2 for a UserError and a
    disk that fails, 75 for a run that was asked to stop, and 1 for any other exception.
    """
    try:
        return job() or 0
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        failures.append(_describe(error))
        return 2
    except Interrupted as error:
        if is_main_process():  # the other processes of a group stop with it
            print(f"interrupted: {error}; the same command goes on from there", file=sys.stderr)
        failures.append(_describe(error))
        return EXIT_CODE
    except Exception as error:
        failures.append(_describe(error))
        if is_out_of_memory(error):  # anywhere else than where a program says what it was doing
            first = (str(error) or type(error).__name__).splitlines()[0]
            print(f"error: out of memory: {first}. Lower batch sizes and lengths; or {OTHERS}.", file=sys.stderr)
            return 2
        # A file that is not there may be a fault of ours; with any other of these errors the disk is the user's matter.
        if isinstance(error, OSError) and error.errno in ADVICE and error.errno != errno.ENOENT:
            kept = "What was done is kept; the same command goes on from it."
            print(f"error: {explain(error)} {kept}", file=sys.stderr)
            return 2
        traceback.print_exc()  # a fault of ours, or of the machine: all of it helps
        return 1


def _refuse(message: str) -> int:
    """Print why a command line is refused; the exit code."""
    print(f"error: {message}", file=sys.stderr)
    return 2


def _describe(error: Exception) -> str:
    composed = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    job = " ".join(overrides()) if composed else ""
    message = (str(error) or type(error).__name__).splitlines()[0]
    return f"{job}: {message}"


def refuse_launcher_without_multirun() -> None:
    """Raise UserError where the command line names a launcher but no sweep."""
    config = HydraConfig.get()
    if config.runtime.choices["launcher"] != "local" or any(o.startswith("launcher") for o in overrides()):
        raise UserError("a launcher is for a sweep: add -m, or leave `launcher` out. This one would be run here.")
