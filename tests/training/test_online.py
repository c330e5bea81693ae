"""Training in stages: what each is made of, its reference, and that a stopped one goes on where it was."""

import gzip
import importlib
import json
import shlex
import shutil
import sys
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra import compose, initialize_config_dir
from transformers import AutoTokenizer

import prefopt.generation.sampler
from prefopt.config.parse import build, parse, register
from prefopt.config.schema import ModelConfig
from prefopt.data.collate import Group, padded
from prefopt.data.formats import Format
from prefopt.data.sources import read_rows, write_rows
from prefopt.data.tokenize import encode_completion
from prefopt.errors import Interrupted, UserError
from prefopt.generation.responses import read_prompts
from prefopt.models.load import load_model, load_reward_model, weights_digest
from prefopt.models.logprobs import completion_logps
from prefopt.objectives.base import Objective
from prefopt.tracking.run import Run
from prefopt.training.config import OnlineConfig, check_online
from prefopt.training.online import run_pending, score_responses, split_prompts, stage_config
from prefopt.utils import signals
from tests.helpers.harm import empty, flip
from tests.helpers.tiny import ROOT, run_program, save_tiny

PROMPTS = [f"Review the {thing} number {i}." for i in range(3) for thing in ("kettle", "train", "soup", "river")]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A model, a reward model, prompts, and held-out rows of scored responses."""
    return make_models(tmp_path_factory.mktemp("online"))


def make_models(folder: Path) -> Path:
    """Fill `folder` with them."""
    save_tiny(folder / "model")
    reward = load_reward_model(ModelConfig("tiny", str(folder / "model")), "cpu")
    torch.manual_seed(1)
    torch.nn.init.normal_(reward.score.weight)
    reward.save_pretrained(folder / "reward")
    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "reward")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in [*PROMPTS, PROMPTS[0]]))
    heldout = {"prompt": "Review the bread.", "responses": ["great", "bad"], "rewards": [0.9, 0.1]}
    (folder / "heldout.jsonl").write_text(json.dumps(heldout) + "\n")
    return folder


def command(tiny: Path, runs: Path, *changes: str) -> list[str]:
    """`changes` take the place of what they change."""
    overrides = [
        "model=hub", f"model.path={tiny / 'model'}", f"prompts={tiny / 'prompts.jsonl'}", f"runs_dir={runs}",
        f"dataset.heldout={tiny / 'heldout.jsonl'}", "scorer=reward_model", f"scorer.path={tiny / 'reward'}",
        "stages=3", "steps=2", "batch_size=2", "eval_every=2", "save_every=1", "micro_batch_tokens=200",
        "samples_per_prompt=3", "stage_sampling.max_new_tokens=6", "stage_sampling.batch_size=6", "objective=mappo",
        "optimizer.lr=1e-2", "sampling.prompts=0", "logger=quiet", "precision=float32", "device=cpu",
    ]  # fmt: skip
    changed = {change.split("=")[0] for change in changes}
    if "scorer=vader" in changes:
        changed.add("scorer.path")
    return [o for o in overrides if o.split("=")[0] not in changed] + list(changes)


def config(tiny: Path, runs: Path, *changes: str) -> OnlineConfig:
    register(OnlineConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        found = parse(compose("online", command(tiny, runs, *changes)), OnlineConfig)
    check_online(found)
    return found


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFOPT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(signals, "install_handlers", lambda: None)  # the test's own process keeps its handlers


def record(runs: Path) -> tuple[Path, dict]:
    (file,) = runs.glob("online-*/record.json")
    return file.parent, json.loads(file.read_text())


def test_parts_hold_every_prompt_once_and_do_not_depend_on_its_place():
    prompts = [[{"role": "user", "content": p}] for p in PROMPTS]
    found = split_prompts([*prompts, prompts[0]], 5)
    assert sorted(map(len, found)) == [2, 2, 2, 3, 3]
    assert sorted(p[0]["content"] for part in found for p in part) == sorted(PROMPTS)
    assert split_prompts(prompts[::-1], 5) == found
    with pytest.raises(UserError, match="2 different prompts do not suffice for stages=3"):
        split_prompts([prompts[0], prompts[1], prompts[0]], 3)


def test_prompts_of_preference_pairs_are_what_their_conversations_share(tmp_path):
    """RLHFlow/UltraFeedback-preference-standard: two conversations a row, no `prompt`, and a prompt in several rows."""
    turn = {"role": "user", "content": "Review the kettle."}
    more = [turn, {"role": "assistant", "content": "Good."}, {"role": "user", "content": "And the train?"}]

    def pair(prompt: list, *texts: str) -> dict:
        sides = [[*prompt, {"role": "assistant", "content": text}] for text in texts]
        return dict(zip(("chosen", "rejected"), sides, strict=True))

    early = pair(more, "Late.", "Fast.") | {"rejected": [*more[:1], {"role": "assistant", "content": "Bad."}]}
    rows = [pair([turn], "Fine.", "Hot."), early, pair(more, "Late.", "Fast."), pair([turn], "Hot.", "Cold.")]
    write_rows(tmp_path / "pairs.jsonl", rows)
    kept, prompts = read_prompts(str(tmp_path / "pairs.jsonl"), None)
    assert prompts == [[turn], more, [turn]]
    assert kept == [rows[0], rows[2], rows[3]]
    assert split_prompts(prompts, 2) in ([[[turn]], [more]], [[more], [[turn]]])
    write_rows(tmp_path / "texts.jsonl", [{"chosen": "Fine.", "rejected": "Hot."}])
    with pytest.raises(UserError, match="no field 'prompt'"):
        read_prompts(str(tmp_path / "texts.jsonl"), None)


@pytest.mark.parametrize(
    ("objective", "change", "key"),
    [
        ("dpo", [], "rewards"),
        ("sppo objective.labels=soft", [], "rewards_01"),
        ("sppo objective.labels=soft", ["dataset.format.win_rates=true"], "rewards"),  # the format makes rates of them
    ],
)
def test_a_stage_trains_on_the_rewards_that_its_objective_wants(objective, change, key, tiny, tmp_path, monkeypatch):
    scored = {"prompt": "Hi", "responses": ["a", "b"], "rewards": [2.0, -1.0], "rewards_01": [0.88, 0.27]}
    monkeypatch.setattr("prefopt.rewards.rows.score_rows", lambda *_, **__: [scored])
    found = config(tiny, tmp_path, f"objective={objective.split()[0]}", *objective.split()[1:], *change)
    written = []
    files = SimpleNamespace(write=lambda _, rows: written.extend(rows))
    built = build(found.objective, Objective, "objective")
    score_responses(found, built, None, tiny / "prompts.jsonl", tmp_path / "scored", files)  # type: ignore[arg-type]
    (row,) = written
    assert (row["rewards"], row["raw_rewards"]) == (scored[key], scored["rewards"])
    pair = build(found.dataset.format, Format, "dataset.format")(row)
    low, high = built.reward_range or (-2.0, 2.0)
    assert low <= pair.rejected_reward < pair.chosen_reward <= high


@pytest.fixture(scope="module")
def whole(tiny, tmp_path_factory) -> Path:
    """The runs folder of an undisturbed run, by the program."""
    runs = tmp_path_factory.mktemp("whole")
    cache = {"PREFOPT_CACHE": str(tiny / "cache")}
    process = run_program(*command(tiny, runs), "logger.curves=true", program="online", env=cache, curves=True)
    assert process.returncode == 0, process.stderr
    return runs


def test_each_stage_begins_where_the_one_before_has_left(whole):
    folder, told = record(whole)
    assert told["status"] == "finished"
    assert [stage["prompts"] for stage in told["stages"]] == [4, 4, 4]
    assert [row["step"] for row in told["evaluations"]] == [0, 2, 4, 6]
    stages = [folder / stage["run"] for stage in told["stages"]]
    assert all((place / "curves.png").is_file() for place in [folder, *stages])
    assert told["evaluations"][0]["chosen_logratio"] == 0
    weights = told["initial_weights"]
    seen = set()
    for n, stage in enumerate(told["stages"], start=1):
        assert stage["initial_weights"] == weights
        weights = stage["final_weights"]
        rows = [row for _, row in read_rows(str(folder / f"stage_{n}" / "scored.jsonl.gz"))]
        seen |= {row["prompt"][0]["content"] for row in rows}
        for row in rows:
            assert len(row["responses"]) == len(row["rewards"]) == 3
            # MaPPO wants [0, 1], and gets sigma(r).
            assert row["rewards"] == pytest.approx([torch.tensor(r).sigmoid().item() for r in row["raw_rewards"]])
        run = json.loads((folder / stage["run"] / "record.json").read_text())
        # By default the first policy is the reference of all stages: later ones begin away from it.
        moved = abs(run["evaluations"][0]["chosen_logratio"]) > 1e-4
        assert moved == (n > 1)
        assert (run["config"]["reference_model"] is not None) == (n > 1)
    assert seen == set(PROMPTS)


@pytest.mark.parametrize(("model", "part"), [("model", "its config"), ("reward", "the config of the scorer")])
def test_a_finished_one_is_not_skipped_with_another_model(model, part, tiny, whole):
    run_pending(config(tiny, whole))  # skipped
    file = tiny / model / "config.json"
    before = file.read_text()
    try:
        file.write_text(json.dumps(json.loads(before) | {"rope_theta": 5000.0}))
        with pytest.raises(UserError, match=rf"began from another model than there is now \(changed: {part}\)"):
            run_pending(config(tiny, whole))
    finally:
        file.write_text(before)
    run_pending(config(tiny, whole))


def test_a_later_stage_keeps_what_its_policy_does_not_carry(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    base = config(tiny, tmp_path)
    kwargs = {"enable_thinking": False}
    model = replace(
        base.model, path="a/b", revision="1" * 40, eos_token="<|im_end|>", chat_template_kwargs=kwargs,
        router_aux_loss_coef=0.01, system_message="drop", date="2025-01-01", resize_embeddings=True,
    )  # fmt: skip
    first = stage_config(replace(base, model=model), tmp_path, None)
    later = stage_config(replace(base, model=model), tmp_path, tmp_path / "policy")
    assert (first.model, first.reference_model) == (model, None)
    plain = ModelConfig(model.name, str(tmp_path / "policy"))
    expected = replace(plain, router_aux_loss_coef=0.01, system_message="drop", date="2025-01-01")
    assert later.model == expected
    # `reference_model` has no revision: the folder of the pinned one.
    assert later.reference_model == str(tmp_path / "models--a--b" / "snapshots" / ("1" * 40))


def test_the_reference_may_be_the_policy_before(tiny, tmp_path):
    run_pending(config(tiny, tmp_path, "stage_reference=previous", "stages=2"))
    folder, told = record(tmp_path)
    for stage in told["stages"]:
        run = json.loads((folder / stage["run"] / "record.json").read_text())
        assert run["evaluations"][0]["chosen_logratio"] == 0


def test_an_accelerated_stage_goes_on_beyond_the_policy_before(tiny, tmp_path):
    """Two stages: the second draws and begins from theta_1 + m (theta_1 - theta_0), and its reference's log-probs are
    (1 + m) lp_1 - m lp_0."""
    run_pending(config(tiny, tmp_path, "objective=dpo", "stage_reference=accelerated", "stages=2"))
    folder, told = record(tmp_path)
    first, second = (folder / stage["run"] for stage in told["stages"])
    weights = [
        load_model(ModelConfig("m", str(path)), "cpu")
        for path in (tiny / "model", first / "policy", folder / "stage_2" / "extrapolated")
    ]
    for initial, trained, start in zip(*(model.parameters() for model in weights), strict=True):
        assert torch.allclose(start, trained + 0.3 * (trained - initial), atol=1e-6)
    assert not torch.equal(initial, trained)
    stage = json.loads((second / "record.json").read_text())
    assert stage["initial_weights"] == weights_digest(weights[2])
    assert stage["config"]["reference_model"] == str(first / "policy")
    (pair,) = (json.loads(line) for line in (second / "heldout" / "step_0000000.jsonl").read_text().splitlines())
    tokenizer = AutoTokenizer.from_pretrained(tiny / "model")
    prompt = [{"role": "user", "content": "Review the bread."}]
    sides = [encode_completion(tokenizer, prompt, text, True) for text in ("great", "bad")]
    batch = padded([Group(sides[0][0], [completion for _, completion in sides])])
    initial, trained, start = (completion_logps(model, batch).sums for model in weights)
    u = start - (1.3 * trained - 0.3 * initial)
    assert pair["margin"] == pytest.approx(0.1 * (u[0] - u[1]).item(), abs=1e-5)


# Where a sitting is stopped: at the call after so many of a function.
POINTS = [
    ("prefopt.generation.sampler", "sample", 1),  # in the middle of the first stage's sampling
    ("prefopt.training.online", "write_rows", 0),  # all drawn, nothing written
    ("prefopt.rewards.rows", "score_rows", 0),
    ("prefopt.training.loop", "train_step", 1),  # in the first stage's training
    ("prefopt.training.checkpoint", "export", 0),
    ("prefopt.generation.sampler", "sample", 1),  # in the middle of the second stage's sampling
    ("prefopt.training.loop", "train_step", 1),
    ("prefopt.training.setup", "run", 2),  # the third stage's
]


def test_wherever_it_is_stopped_it_ends_with_the_same_weights(tiny, whole, tmp_path, monkeypatch):
    """One run, stopped at eight points one after the other; what is made is not made again."""
    expected_folder, expected = record(whole)
    drawn: list[str] = []
    sample = prefopt.generation.sampler.sample

    def counted(model, tokenizer, prompts, *others, **more):
        drawn.extend(p[0]["content"] for p in prompts)
        return sample(model, tokenizer, prompts, *others, **more)

    monkeypatch.setattr(prefopt.generation.sampler, "sample", counted)
    calls = {}
    for module, name, after in POINTS:
        place = importlib.import_module(module)
        function = getattr(place, name)

        def stopping(*args, function=function, key=(module, name), after=after, **kwargs):
            calls[key] = calls.get(key, 0) + 1
            if calls[key] == after + 1:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(place, name, stopping)
            with pytest.raises(KeyboardInterrupt):
                run_pending(config(tiny, tmp_path))
        _, told = record(tmp_path)
        assert told["status"] == "interrupted"
    run_pending(config(tiny, tmp_path))
    folder, told = record(tmp_path)
    assert told["status"] == "finished"
    assert [s["final_weights"] for s in told["stages"]] == [s["final_weights"] for s in expected["stages"]]
    assert told["evaluations"] == expected["evaluations"]
    for n in (1, 2, 3):
        name = Path(f"stage_{n}") / "scored.jsonl.gz"
        assert (folder / name).read_bytes() == (expected_folder / name).read_bytes()
    assert not list(folder.rglob("*.partial"))
    assert sorted(drawn) == sorted(PROMPTS)


GROUPS = ["dataset.format.pairing=group", "stages=2"]


@pytest.mark.parametrize("name", ["grpo", "rloo", "sft"])
def test_groups_are_trained_in_stages_and_go_on_where_they_were(name, tiny, tmp_path, monkeypatch):
    """Stopped in the training of the second stage, whose reference is not the policy that has drawn its responses."""
    changes = [*GROUPS, f"objective={name}"]
    run_pending(config(tiny, tmp_path / "whole", *changes))
    loop = importlib.import_module("prefopt.training.loop")
    train, calls = loop.train_step, []

    def stopping(*args):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return train(*args)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_pending(config(tiny, tmp_path / "parts", *changes))
    run_pending(config(tiny, tmp_path / "parts", *changes))
    _, told = record(tmp_path / "whole")
    _, again = record(tmp_path / "parts")
    assert again["evaluations"] == told["evaluations"]
    assert [s["final_weights"] for s in again["stages"]] == [s["final_weights"] for s in told["stages"]]
    assert len({told["initial_weights"], *(s["final_weights"] for s in told["stages"])}) == 3
    for stage in told["stages"]:
        counts = stage["data"]["train"]
        assert (counts["items"], counts["kind"], counts["dropped"]) == (6, "groups", {})


def test_raft_is_fine_tuning_on_the_best_of_k(tiny, tmp_path):
    """A stage with objective=sft against prefopt.train on rows of the best response and another text."""
    from prefopt.training.setup import prepare_run, run

    raft = config(tiny, tmp_path / "raft", "dataset.format.pairing=group", "stages=1", "objective=sft")
    run_pending(raft)
    folder, told = record(tmp_path / "raft")
    rows = []
    for _, row in read_rows(str(folder / "stage_1" / "scored.jsonl.gz")):
        best = max(range(3), key=lambda i: row["rewards"][i])
        kept = {"responses": [row["responses"][best], "Another."], "finished": [row["finished"][best], True]}
        rows.append({"prompt": row["prompt"], "rewards": [1.0, 0.0]} | kept)
    write_rows(tmp_path / "best.jsonl", rows)
    plain = stage_config(raft, tmp_path / "sft", None)
    pairs = {**plain.dataset.format, "pairing": "best_worst"}
    dataset = replace(plain.dataset, train=str(tmp_path / "best.jsonl"), heldout=None, format=pairs)
    run(prepare_run(replace(plain, dataset=dataset, runs_dir=str(tmp_path / "sft"))))
    (file,) = (tmp_path / "sft").glob("*/record.json")
    assert json.loads(file.read_text())["final_weights"] == told["final_weights"]


def interrupted(tiny: Path, runs: Path, monkeypatch, stage: int = 2) -> Path:
    """The folder of an online run that was stopped before the training of this stage."""
    setup = importlib.import_module("prefopt.training.setup")
    run, calls = setup.run, []

    def stopping(*args, **kwargs):
        calls.append(1)
        if len(calls) == stage:
            raise KeyboardInterrupt
        return run(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(setup, "run", stopping)
        with pytest.raises(KeyboardInterrupt):
            run_pending(config(tiny, runs))
    return record(runs)[0]


def read_lines(file: Path) -> list[bytes]:
    return gzip.decompress(file.read_bytes()).splitlines(keepends=True)


def drop_half(file: Path) -> None:
    lines = read_lines(file)
    file.write_bytes(gzip.compress(b"".join(lines[: len(lines) // 2]), mtime=0))


@pytest.fixture(scope="module")
def halfway(tiny, tmp_path_factory) -> Path:
    """The runs folder of an online run that was stopped before the training of its second stage."""
    runs = tmp_path_factory.mktemp("halfway")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PREFOPT_CACHE", str(tiny / "cache"))
        patch.setattr(signals, "install_handlers", lambda: None)
        interrupted(tiny, runs, patch)
    return runs


@pytest.mark.parametrize("names", [("samples",), ("scored",), ("samples", "scored")], ids=" and ".join)
@pytest.mark.parametrize("harm", [drop_half, empty, Path.unlink])
def test_rows_of_a_stage_that_are_damaged_are_made_anew(harm, names, tiny, whole, halfway, tmp_path, capsys):
    """Of a stage that has trained, and of one that has not."""
    shutil.copytree(halfway, tmp_path / "runs")
    folder, _ = record(tmp_path / "runs")
    expected_folder, expected = record(whole)
    for n in (1, 2):
        for name in names:
            harm(folder / f"stage_{n}" / f"{name}.jsonl.gz")
    run_pending(config(tiny, tmp_path / "runs"))
    said = capsys.readouterr().err
    _, told = record(tmp_path / "runs")
    assert [s["final_weights"] for s in told["stages"]] == [s["final_weights"] for s in expected["stages"]]
    for n in (1, 2):
        read = [name for name in names if name == "scored" or "scored" in names]  # else it is not read again
        for name in read:
            assert f"{folder / f'stage_{n}' / name}.jsonl.gz is damaged: it is not the file of 4 rows" in said
            file = Path(f"stage_{n}") / f"{name}.jsonl.gz"
            assert (folder / file).read_bytes() == (expected_folder / file).read_bytes()
    assert told["files"] == expected["files"]
    assert told["files"]["stage_1/scored.jsonl.gz"]["rows"] == 4
    assert all((folder / name).is_file() for name in told["files"] if "samples" not in name)


def test_rows_that_come_out_otherwise_are_not_mixed_with_a_trained_stage(tiny, halfway, tmp_path, monkeypatch):
    shutil.copytree(halfway, tmp_path / "runs")
    folder, _ = record(tmp_path / "runs")
    scored = folder / "stage_1" / "scored.jsonl.gz"
    drop_half(scored)
    with monkeypatch.context() as patch:
        rows = importlib.import_module("prefopt.rewards.rows")
        score = rows.score_rows
        patch.setattr(rows, "score_rows", lambda *a, **k: [row | {"more": 1} for row in score(*a, **k)])
        with pytest.raises(UserError, match=rf"{scored} was damaged, and made anew it holds other rows"):
            run_pending(config(tiny, tmp_path / "runs"))


def test_a_damaged_policy_of_a_stage_is_refused_and_trained_again(tiny, whole, halfway, tmp_path):
    shutil.copytree(halfway, tmp_path / "runs")
    folder, _ = record(tmp_path / "runs")
    (run,) = (folder / "stage_1").glob("*/record.json")
    flip(run.parent / "policy" / "model.safetensors")
    with pytest.raises(UserError, match=rf"model.safetensors is damaged.*remove {run.parent} to train"):
        run_pending(config(tiny, tmp_path / "runs"))
    shutil.rmtree(run.parent)
    run_pending(config(tiny, tmp_path / "runs"))
    assert record(tmp_path / "runs")[1]["final_weights"] == record(whole)[1]["final_weights"]


def test_an_online_folder_that_was_moved_does_not_train_again(tiny, whole, halfway, tmp_path, monkeypatch):
    shutil.copytree(halfway, tmp_path / "elsewhere" / "runs")
    trained: list[str] = []
    loop = importlib.import_module("prefopt.training.loop")
    train = loop.train_step
    monkeypatch.setattr(loop, "train_step", lambda *a, **k: (trained.append("step"), train(*a, **k))[1])
    run_pending(config(tiny, tmp_path / "elsewhere" / "runs"))
    folder, told = record(tmp_path / "elsewhere" / "runs")
    _, expected = record(whole)
    assert len(trained) == 4  # two stages of two steps
    assert told["final_weights"] == expected["final_weights"]
    assert told["stages"] == expected["stages"]
    for stage in told["stages"]:
        assert (folder / stage["policy"] / "model.safetensors").is_file()
        assert len(list((folder / stage["run"]).parent.glob("*/record.json"))) == 1


def test_a_finished_one_is_skipped_and_another_setting_is_another_folder(tiny, whole, tmp_path, capsys):
    runs = shutil.copytree(whole, tmp_path / "runs")
    run_pending(config(tiny, runs))
    assert "finished, skipped" in capsys.readouterr().err
    base = config(tiny, runs)
    digests = {"prompts": "a"}
    names = {Run(asdict(c), "online-mappo_dpo", digests).name for c in (base, replace(base, stages=2))}
    assert len(names | {Run(asdict(base), "online-mappo_dpo", {"prompts": "b"}).name}) == 3


@pytest.mark.slow
def test_a_sweep_is_a_job_for_each_and_ends_as_each_alone(tiny, whole, tmp_path):
    place = f"hydra.sweep.dir={tmp_path / 'sweep'}"
    sweep = [
        "-m",
        *command(tiny, tmp_path / "runs", "objective=mappo,dpo", "logger.curves=true"),
        "launcher.at_once=2",
        place,
    ]
    process = run_program(*sweep, program="online", env={"PREFOPT_CACHE": str(tmp_path / "cache")})
    assert process.returncode == 0, process.stderr
    found = {f.parent.name.split("-model-")[0]: json.loads(f.read_text()) for f in tmp_path.glob("runs/*/record.json")}
    assert set(found) == {"online-mappo_dpo", "online-dpo"}
    expected, alone = record(whole)
    mappo = found["online-mappo_dpo"]
    assert mappo["name"] == expected.name
    folder = tmp_path / "runs" / mappo["name"]
    assert (folder / "curves.png").is_file()
    assert mappo["final_weights"] == alone["final_weights"] != found["online-dpo"]["final_weights"]
    # What is written down is what does it again, alone, and not that a launcher started it; in each stage too.
    stages = [json.loads((folder / stage["run"] / "record.json").read_text()) for stage in mappo["stages"]]
    words = shlex.split(mappo["command"])
    assert words[:3] == ["python", "-m", "prefopt.online"]
    given = [o.replace("1e-2", "0.01") for o in command(tiny, tmp_path / "runs", "objective=mappo")]
    assert sorted(words[3:]) == sorted([*given, "logger.curves=True"])
    assert [(r["command"], r["code"]) for r in stages] == [(mappo["command"], mappo["code"])] * 3
    again = run_program(*sweep[:-1], f"{place}_again", program="online")
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("finished, skipped") == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["launcher=slurm", "launcher.gpus=2"], "2 processes, and engine=single trains in one: add engine=fsdp"),
        (["launcher=slurm", "launcher.gpus=0", "precision=auto"], "precision=auto asks the machine that trains"),
        (["objective=dpo,sft"], "objective=sft: objective sft reads no pairs"),
        (["stages=3,100"], "stages=100: 12 different prompts do not suffice"),
    ],
)
def test_one_job_that_is_refused_refuses_the_sweep(changes, message, tiny, tmp_path):
    sweep = ["-m", *command(tiny, tmp_path / "runs", *changes), f"hydra.sweep.dir={tmp_path / 'sweep'}"]
    process = run_program(*sweep, program="online", env={"PREFOPT_CACHE": str(tmp_path / "cache")})
    assert process.returncode == 2
    assert "nothing was started, because of these jobs" in process.stderr
    assert message in process.stderr
    assert not (tmp_path / "runs").exists()
    assert not (tmp_path / "sweep").exists()


def test_prompts_whose_responses_are_all_equal_are_dropped_and_counted(tiny, tmp_path):
    """The tiny model's words mean nothing to VADER: all rewards of most prompts are those of a neutral text."""
    with pytest.raises(UserError, match=r"nothing is left of the train split .*no_preference: 4"):
        run_pending(config(tiny, tmp_path, "scorer=vader", "stage_sampling.max_new_tokens=1"))
    _, told = record(tmp_path)
    assert told["status"] == "failed"
    assert "no_preference: 4" in told["error"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["stages=0"], "stages must be at least 1"),
        (["samples_per_prompt=1"], "samples_per_prompt must be at least 2"),
        (["stage_reference=last"], "stage_reference must be initial, previous or accelerated"),
        (["stage_sampling.temperature=-1"], "stage_sampling.temperature must not be negative"),
        (["dataset.train=x.jsonl"], "a stage makes its own rows"),
        (["backend=llama.cpp"], "backend must be transformers or server"),
        (["server.url=http://localhost:1/v1"], r"server.command and url must both name \{port\}"),
        (["reference=adapter_off", "peft=lora_attention"], "set stage_reference=previous"),
        (["model.adapter=adapter"], r"model\.adapter: the initial policy is a reference of later stages"),
        (["model.resize_embeddings=true"], r"model\.resize_embeddings: the initial policy is a reference"),
        (["objective=tis_dpo"], "objective tis_dpo reads weights of tokens, which a stage's own responses do not have"),
        (["objective=sft"], "objective sft reads no pairs.*dataset.format.pairing=group"),
        (["objective=grpo"], "objective grpo reads no pairs.*dataset.format.pairing=group"),
        (["dataset.format.pairing=group"], "compares two responses: set dataset.format.pairing=best_worst"),
        (["objective=reward"], "objective reward does not train a policy"),
        (["stage_reference=accelerated", "reference=resident"], "scores two references, once"),
        (["stage_reference=accelerated", "reference_model=m"], "reference_model: stage_reference=accelerated makes"),
        (["stage_reference=accelerated", "objective=simpo"], "objective simpo reads no reference"),
        (["stages=100"], "12 different prompts do not suffice for stages=100"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_made(changes, message, tiny, tmp_path):
    with pytest.raises(UserError, match=message):
        run_pending(config(tiny, tmp_path / "runs", *changes))
    assert not (tmp_path / "runs").exists()


def test_a_stopped_sampling_goes_on_and_ends_with_the_same_file(tiny, tmp_path, monkeypatch):
    """With a line torn by a kill, and refused where the settings are others."""
    from prefopt.config.schema import SamplingConfig
    from prefopt.generation import responses

    prompts = [[{"role": "user", "content": p}] for p in PROMPTS]
    model = ModelConfig("tiny", str(tiny / "model"), None)
    partial = tmp_path / "out.partial"

    def drawing(temperature: float = 1.0):
        sampling = SamplingConfig(temperature, 1.0, 6, 6)
        request = responses.GenerationRequest(model, prompts, sampling, 2, 0, "transformers", "cpu", "float32")
        return responses.generate_resumable(request, partial)

    expected = drawing()
    lines = partial.read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + len(prompts)
    partial.write_bytes(b"".join(lines[:5]) + lines[5][:10])
    drawn: list[int] = []
    sample = prefopt.generation.sampler.sample
    monkeypatch.setattr(
        prefopt.generation.sampler,
        "sample",
        lambda m, t, p, *a, **k: (drawn.append(len(p)), sample(m, t, p, *a, **k))[1],
    )
    assert drawing() == expected
    assert sum(drawn) == len(prompts) - 3  # two prompts of the torn chunk are drawn again with their chunk
    assert partial.read_bytes() == b"".join(lines)
    with pytest.raises(UserError, match="was begun with other settings"):
        drawing(0.5)
    monkeypatch.setattr(signals.stop_flag, "is_set", True)
    partial.unlink()
    with pytest.raises(Interrupted, match="0 of 12 prompts"):
        drawing()


@pytest.mark.slow
def test_each_stage_is_sampled_by_a_server_of_its_own_policy(tiny, tmp_path):
    script = ROOT / "tests" / "helpers" / "openai_server.py"
    server = f"server.command='{sys.executable} {script} {{model}} {{port}}'"
    found = config(tiny, tmp_path / "runs", "stages=2", "objective=dpo", "backend=server", server)
    run_pending(found)
    folder, of_run = record(tmp_path / "runs")
    assert of_run["status"] == "finished"
    asked = [(folder / f"stage_{n}" / "server.log").read_text().splitlines()[0] for n in (1, 2)]
    assert str(tiny / "model") in asked[0]
    assert str(folder / of_run["stages"][0]["policy"]) in asked[1]
    before = (folder / "record.json").read_bytes()
    found.server.command = "false {model} {port}"  # how it is served is no part of what the run is
    run_pending(found)
    assert (folder / "record.json").read_bytes() == before
