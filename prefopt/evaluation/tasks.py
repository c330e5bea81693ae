"""Tasks of LM-Harness: lm-eval's own, and those of a folder of the user's."""

import hashlib
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.config.parse import file_name_problems
from prefopt.errors import UserError
from prefopt.evaluation.config import HarnessConfig

if TYPE_CHECKING:
    from lm_eval.api.task import Task
    from lm_eval.tasks import TaskManager

NO_CONTEXT = "loglikelihood_rolling"  # tasks that score a text by itself, a perplexity


@dataclass(frozen=True)
class OwnTasks:
    """The tasks, groups and tags that the YAML files of a folder define. `digest`: SHA-256 of all files in it."""

    folder: str
    digest: str
    names: frozenset[str]

    def title(self, name: str) -> str:
        """A task's name in records and tables. A folder's has the digest: after an edit it is another task."""
        return f"{name}@{self.digest[:8]}" if name in self.names else name


def read_own_tasks(folder: str | None) -> OwnTasks | None:
    """What is in the folder `include`; None for None. No code of it is run.

    Raises UserError where it defines no task, and where the digest would not tell all of it: links, YAML elsewhere.
    """
    if folder is None:
        return None
    from lm_eval.tasks import TaskManager

    root = Path(folder).resolve()
    digests = hashlib.sha256()
    for file in sorted(root.rglob("*")):
        if file.is_symlink():
            raise UserError(f"include={folder}: {file.name} is a link. Put the file itself there.")
        if file.is_file() and "__pycache__" not in file.parts:
            for part in (file.relative_to(root).as_posix().encode(), file.read_bytes()):
                digests.update(hashlib.sha256(part).digest())
    for file in sorted(root.rglob("*.yaml")):
        _check_yaml(file, root, folder)

    names = frozenset(TaskManager(include_path=str(root), include_defaults=False).all_tasks)
    if not names:
        raise UserError(f"include={folder} defines no task: lm-eval finds none in its *.yaml files.")
    if problems := file_name_problems({f"include={folder}: {name}": name for name in sorted(names)}):
        raise UserError("\n".join(problems))
    return OwnTasks(str(root), digests.hexdigest(), names)


def _check_yaml(file: Path, root: Path, folder: str) -> None:
    """Raise UserError where a YAML cannot be read, or includes one that is neither below `root` nor lm-eval's."""
    import lm_eval.tasks
    from lm_eval.tasks._yaml_loader import load_yaml

    try:
        included = load_yaml(file, resolve_func=False, recursive=False).get("include", [])
    except Exception as error:  # PyYAML and lm-eval raise several kinds
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"include={folder}: {file.name} cannot be read: {reason}") from None
    for name in included if isinstance(included, list) else [included]:
        target = (file.parent / name).resolve()
        if target.is_relative_to(Path(lm_eval.tasks.__file__).parent):
            continue
        if not target.is_relative_to(root):
            raise UserError(
                f"include={folder}: {file.name} includes {name}, which is not in this folder. Copy it there."
            )
        if target.is_file() and target.suffix != ".yaml":
            _check_yaml(target, root, folder)


def task_manager(own: OwnTasks | None, names: Iterable[str]) -> "TaskManager":
    """lm-eval's index of its tasks, and of those in `own`. Raises UserError for a name that both have.

    Where `names` are tasks of `own` alone, its index is enough: lm-eval's takes many seconds.
    """
    from lm_eval.tasks import TaskManager

    if own:
        manager = TaskManager(include_path=own.folder, include_defaults=False)
        if set(names) <= set(manager.all_subtasks):
            return manager
    manager = TaskManager()
    if own is None:
        return manager
    if taken := sorted(own.names & set(manager.all_tasks)):
        raise UserError(
            f"include={own.folder} defines {', '.join(taken)}, and lm-eval has tasks, groups or tags of that name. "
            "Give yours another."
        )
    return TaskManager(include_path=own.folder)


def preflight(names: list[str], manager: "TaskManager | None" = None) -> "dict[str, dict[str, Task]]":
    """Load all tasks with their data: by name, the tasks that it stands for. Raises one UserError that names every task
    which does not exist, lacks its data, or cannot be run here."""
    import datasets

    if not sys.stderr.isatty():
        datasets.disable_progress_bars()
    manager = manager or task_manager(None, names)
    loaded, problems, failed = {}, [], []
    for name in names:
        try:
            tasks = manager.load([name])["tasks"]
        except Exception as error:  # `datasets` and lm-eval raise a dozen kinds
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            problems.append(f"task {name} cannot be loaded: {reason}")
            failed.append(name)
            continue
        if not tasks:
            problems.append(f"{name} names no task")
        for task_name, task in tasks.items():  # what lm-eval refuses after the model is loaded
            if getattr(task, "UNSAFE_CODE", False):
                problems.append(f"task {task_name} runs code that the model writes, which is not done here")
            if getattr(task, "MULTIMODAL", False):
                problems.append(f"task {task_name} needs a model that reads images or sound")
        loaded[name] = tasks
    if failed:
        problems.append(
            "`lm-eval ls tasks` lists the names. Missing data are fetched on a machine with network: python -m "
            f"prefopt.prefetch 'tasks=[{','.join(failed)}]'. Tasks of your own need include=FOLDER."
        )
    if problems:
        raise UserError("\n".join(problems))
    return loaded


def expand_tags(names: list[str], manager: "TaskManager") -> list[str]:
    """`names` with the tasks of a tag (`ai2_arc`, `glue`) in its place, each name once. lm-eval evaluates a tag's tasks
    as if they had been named, and has no figure of the tag. Groups stay: they may give their tasks other settings."""
    tags = {name: sorted(manager.task_index[name].tags) for name in names if name in manager.all_tags}
    return list(dict.fromkeys(task for name in names for task in tags.get(name, [name])))


# Why a setting changes nothing in a task.
WHY = {
    "gen_kwargs": "nothing is generated there",
    "num_fewshot": "a task that says 0 stays at 0, and a text that is scored by itself has no examples",
    "system_instruction": "a text is scored by itself",
}


def check_used(loaded: "dict[str, dict[str, Task]]", config: HarnessConfig) -> None:
    """Raise UserError that names every setting which lm-eval would ignore in all tasks of a name in `loaded`."""
    idle: dict[str, list[str]] = {}
    for name, tasks in loaded.items():
        # A whole suite is evaluated with the chat template. That a part has no use for it is said beneath its figures.
        for setting in set.intersection(*(set(unused_settings(t, config)) for t in tasks.values())) - {"chat_template"}:
            idle.setdefault(setting, []).append(name)
    if idle:
        lines = [f"{key} changes nothing in {', '.join(idle[key])}: {WHY[key]}." for key in sorted(idle)]
        raise UserError("\n".join([*lines, "Evaluate these tasks by a command of their own, without it."]))


def unused_settings(task: "Task", config: HarnessConfig) -> Iterator[str]:
    """The keys of `config` that are set, and that lm-eval ignores in this task."""
    kind = task.get_config("output_type")
    if config.gen_kwargs and kind != "generate_until":
        yield "gen_kwargs"
    if config.num_fewshot and (task.get_config("num_fewshot") == 0 or kind == NO_CONTEXT):
        yield "num_fewshot"
    if kind == NO_CONTEXT:
        yield from (key for key in ("system_instruction", "chat_template") if getattr(config, key))


def unused_in_requests(samples: dict[str, list[dict[str, Any]]], config: HarnessConfig) -> Iterator[tuple[str, str]]:
    """(setting, task) of what was set and no request of the task shows: some tasks write their requests themselves."""
    text, wanted = (config.system_instruction or "").strip(), config.gen_kwargs.items()
    for task, rows in samples.items():
        requests = [request for row in rows for request in row["arguments"]]
        if not any(text in request[0] for request in requests):
            yield "system_instruction", task
        said = [request[1] for request in requests if len(request) > 1 and isinstance(request[1], dict)]
        if wanted and not any(all(settings.get(key) == value for key, value in wanted) for settings in said):
            yield "gen_kwargs", task
