"""Every sweep file: each of its jobs composes, passes the checks, and is another run."""

import csv
import functools
import itertools
from dataclasses import asdict

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict

from prefopt.config.parse import build, parse, register
from prefopt.objectives.base import Objective
from prefopt.tracking.run import Run
from prefopt.training.config import OnlineConfig, TrainConfig, check, check_online
from tests.helpers.tiny import ROOT, records, run_program

FOLDER = ROOT / "sweeps" / "sweep"
SWEEPS = sorted(
    str(file.relative_to(FOLDER).with_suffix(""))
    for file in FOLDER.rglob("*.yaml")
    if not file.name.startswith("_") and "online" not in file.name
)
PUBLISHED = ROOT / "results" / "published"


def composed(program: str, overrides: list[str]) -> DictConfig:
    register({"train": TrainConfig, "online": OnlineConfig}[program])  # OnlineConfig stands for train_schema, too
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        return compose(program, overrides, return_hydra_config=True)


@functools.cache
def jobs(name: str) -> list[Run]:
    """What the sweep file expands to; a model or data file that it wants to be told is told here."""
    first = composed("train", [f"+sweep={name}"])
    params = OmegaConf.to_container(first.hydra.sweeper.params)
    assert isinstance(params, dict)
    wanted = {"model.path": OmegaConf.is_missing(first.model, "path")}
    wanted["dataset.train"] = first.dataset.train is None and not first.dataset.sources
    told = [f"{key}=told" for key, wants in wanted.items() if wants and key not in params]
    grid = itertools.product(
        *([f"{key}={value}" for value in str(values).split(",")] for key, values in params.items())
    )
    runs = []
    for point in grid:
        cfg = composed("train", [f"+sweep={name}", *told, *point])
        with open_dict(cfg):
            del cfg["hydra"]
        config = parse(cfg, TrainConfig)
        check(config)
        runs.append(Run(asdict(config), build(config.objective, Objective, "objective").name, {}))
    return runs


@pytest.mark.slow
@pytest.mark.parametrize("name", SWEEPS)
def test_jobs_compose_and_differ(name):
    names = [run.name for run in jobs(name)]
    assert len(names) >= (1 if "/" in name else 2)
    assert len(set(names)) == len(names)


def table(name: str) -> list[dict[str, str]]:
    with (PUBLISHED / f"{name}.csv").open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("row", table("mmpo_table_3"), ids=lambda row: f"{row['model']}-{row['objective']}")
def test_mmpos_grid_is_its_table_3(row):
    """Every block: count, and each hyperparameter that the table or the issue names."""
    runs = jobs(f"mmpo/{row['model'].replace('.', '_').replace('-', '_')}_{row['objective']}")
    configs = [run.record["config"] for run in runs]
    betas = [float(beta) for beta in row["betas"].split("|")]
    assert [config["objective"]["beta"] for config in configs] == betas
    for run, config in zip(runs, configs, strict=True):
        objective = config["objective"]
        assert run.record["objective"] == row["objective"]
        assert config["model"]["name"] == row["model"]
        assert config["optimizer"]["lr"] == float(row["learning_rate"])
        assert (config["epochs"], config["steps"], config["exports"]) == (
            float(row["epochs"]),
            None,
            int(row["epochs"]),
        )
        assert config["batch_size"] == 2 * 16 * 4
        assert (config["max_prompt_tokens"], config["max_completion_tokens"]) == (1800, 512)
        assert (config["schedule"]["warmup"], config["precision"]) == (0.1, "bfloat16")
        assert config["schedule"]["_target_"].endswith("Cosine")
        assert set(config["dataset"]["sources"]) == {"orca", "ultrafeedback"}
        assert config["optimizer"]["eight_bit"] == (row["optimizer"] == "adamw_8bit")
        if row["trainable"] == "full":
            assert config["peft"]["target_modules"] == []
        else:
            kinds = {"attention": 4, "attention+mlp": 7}
            assert len(config["peft"]["target_modules"]) == kinds[row["lora_targets"]]
            assert [config["peft"][k] for k in ("r", "alpha", "dropout")] == [
                float(row[f"lora_{k}"]) for k in ("r", "alpha", "dropout")
            ]
        if row["simpo_gamma_over_beta"]:
            assert objective["gamma_beta_ratio"] == float(row["simpo_gamma_over_beta"])
        if row["mmpo_margin"]:
            assert objective["margin"] == float(row["mmpo_margin"])
            assert (objective["normalization"], objective["micro_batch_size"]) == ("micro_batch", 2)


def test_mmpos_grid_has_no_other_blocks():
    others = ("sft", "tuning", "ablation", "margin")
    blocks = {name for name in SWEEPS if name.startswith("mmpo/") and not name.split("/")[1].startswith(others)}
    assert blocks == {
        f"mmpo/{row['model'].replace('.', '_').replace('-', '_')}_{row['objective']}" for row in table("mmpo_table_3")
    }
    assert sum(len(jobs(name)) for name in blocks) == 45  # three models at four betas and one at three, three methods


@pytest.mark.slow
def test_mmpos_ablations_are_those_of_its_section_5():
    """One switch each of the tuned run of SmolLM2-360M at beta 0.05; and the fork's margin on SmolLM2-135M."""
    switches = {
        "length": ("length_normalize", True),
        "entropy": ("entropy_bonus", True),
        "auxiliary": ("auxiliary_weight", 0.0),
        "normalization": ("normalization", "none"),
    }
    configs = [run.record["config"] for run in jobs("mmpo/smollm2_360m_mmpo")]
    (tuned,) = [config for config in configs if config["objective"]["beta"] == 0.05]
    for name, (key, value) in switches.items():
        (run,) = jobs(f"mmpo/ablation_{name}")
        config = run.record["config"]
        changed = {"objective": tuned["objective"] | {key: value}, "runs_dir": "runs/paper/mmpo/ablations"}
        assert config == tuned | changed
    assert [r.record["config"]["objective"]["margin"] for r in jobs("mmpo/margin")] == [0.8] * 4


@pytest.mark.slow
def test_mmpos_tuning_is_the_forks():
    counts = {"dpo": 7, "simpo": 35, "mmpo": 14}
    for name, n in counts.items():
        configs = [run.record["config"] for run in jobs(f"mmpo/tuning_{name}")]
        assert len(configs) == n
        assert {c["epochs"] for c in configs} == {2}
        assert {c["optimizer"]["lr"] for c in configs} == {1e-3, 5e-4, 1e-4, 5e-5, 1e-5, 5e-6, 1e-6}
    ratios = {run.record["config"]["objective"]["gamma_beta_ratio"] for run in jobs("mmpo/tuning_simpo")}
    assert ratios == {0.3, 0.5, 1.0, 1.4, 1.6}


def test_mappos_runs_are_its_table_2():
    """Each method of the table that is trained offline has a sweep, with the paper's settings."""
    methods = {row["method"] for row in table("mappo_table_2") if not row["method"].startswith("i-")}
    names = {m: f"mappo/offline_{'mappo_' if m.endswith('+mappo') else ''}{m.partition('+')[0]}" for m in methods}
    assert set(names.values()) == {name for name in SWEEPS if name.startswith("mappo/")}
    for method, name in names.items():
        (run,) = jobs(name)
        config = run.record["config"]
        base = config["objective"]["base"] if method.endswith("+mappo") else config["objective"]
        assert run.record["objective"] == name.partition("offline_")[2]
        assert base["beta"] == 0.1
        assert (config["batch_size"], config["optimizer"]["lr"], config["optimizer"]["weight_decay"]) == (
            128,
            5e-7,
            0.01,
        )
        assert (config["schedule"]["warmup"], config["precision"]) == (100, "bfloat16")
        if "simpo" in method:
            assert base["beta"] * base["gamma_beta_ratio"] == pytest.approx(1)
        if "cpo" in method:
            assert base["nll_weight"] == 0.2


@pytest.mark.parametrize("name", ["mappo/online_dpo", "mappo/online_mappo"])
def test_mappos_online_runs(name):
    given = [f"+sweep={name}", "model.path=told", "prompts=told", "dataset.heldout=null"]
    cfg = composed("online", given)
    with open_dict(cfg):
        del cfg["hydra"]
    config = parse(cfg, OnlineConfig)
    check_online(config)
    assert (config.stages, config.samples_per_prompt, config.stage_sampling.temperature) == (3, 8, 1.0)
    assert (config.stage_reference, config.epochs) == ("previous", 2)
    assert (config.batch_size, config.optimizer.lr, config.schedule["warmup"]) == (128, 5e-7, 100)
    assert build(config.objective, Objective, "objective").name == name.partition("_")[2].replace("mappo", "mappo_dpo")


@pytest.mark.slow
def test_madpos_runs_are_its_settings():
    methods = {row["method"].replace("-", "_") for row in table("madpo_table_1")}
    beta_dpo = [run.record for run in jobs("madpo/methods_beta_dpo")]
    assert {r["config"]["objective"]["margin_of"] for r in beta_dpo} == {"reward"}
    configs = [run.record for run in jobs("madpo/methods")] + beta_dpo
    assert {r["objective"] for r in configs} == methods
    assert len(configs) == 4 * 3 * 3
    ablation = [run.record for run in jobs("madpo/ablation")]
    assert {r["config"]["objective"]["only"] for r in ablation} == {None, "amplification", "damping"}
    assert len(ablation) == 3 * 3 * 3
    for record in configs + ablation + [run.record for run in jobs("madpo/sensitivity")]:
        config = record["config"]
        assert [config["peft"][k] for k in ("r", "alpha", "dropout")] == [16, 32, 0.05]
        assert (config["optimizer"]["lr"], config["steps"], config["batch_size"]) == (1e-5, 626, 32)
        assert (config["optimizer"]["betas"], config["optimizer"]["weight_decay"]) == ([0.9, 0.95], 0.01)
        assert config["schedule"]["warmup"] == 0.03


# What a sweep file decides itself, whatever the defaults: steps, epochs, pairs a step, steps between evaluations and
# between checkpoints, held-out pairs, most tokens of prompt, completion and sample.
SIZES = {
    "demo": (10, None, 8, 10, 4, 64, 1800, 512, 64),
    "lab/": (100, None, 32, 100, 100, None, 1800, 1024, 40),
    "lab/mmpo": (None, 5, 32, 100, 100, None, 1800, 1024, 40),
    "lab/rewards": (256, None, 32, 64, 64, None, 1800, 1024, 40),
    "lab/sft": (800, None, 64, 200, 200, None, 1800, 1024, 40),
    "madpo/": (626, None, 32, 626, 626, None, 64, 192, 176),
    "madpo/rewards": (None, 12, 32, 20, 20, None, 64, 192, 176),
    "madpo/sft": (None, 5, 32, 98, 98, None, 64, 192, 176),
    "mappo/offline": (None, 1, 128, 100, 50, 512, 2048, 2048, 64),
    "mini/mappo": (8, None, 8, 8, 4, 32, 1800, 512, 64),
    "mini/mmpo": (10, None, 8, 10, 4, 32, 1800, 512, 64),
    "mmpo/": (None, 5, 128, 64, 64, 512, 1800, 512, 64),
    "mmpo/sft_llama3_2_1b": (None, 3, 8, 2000, 1000, 512, 4096, 4096, 64),
    "mmpo/sft_llama3_2_1b_v3": (None, 3, 64, 2000, 1000, None, 4096, 4096, 64),
    "mmpo/sft_smollm2": (None, 2, 32, 1000, 1000, 512, 2048, 2048, 64),
    "mmpo/tuning": (None, 2, 128, 64, 64, 512, 1800, 512, 64),
    "objectives": (8, None, 8, 8, 4, 16, 1800, 512, 64),
}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_decides_its_sizes_itself(name):
    """A default that changes must not change an experiment."""
    config = jobs(name)[0].record["config"]
    keys = ("steps", "epochs", "batch_size", "eval_every", "save_every", "heldout_pairs", "max_prompt_tokens")
    found = (*(config[key] for key in keys), config["max_completion_tokens"], config["sampling"]["max_new_tokens"])
    assert found == SIZES[max((prefix for prefix in SIZES if name.startswith(prefix)), key=len)]
    assert config["optimizer"]["lr"] is not None


def test_the_demo_is_three_objectives_at_one_learning_rate():
    configs = [run.record["config"] for run in jobs("demo")]
    assert [run.record["objective"] for run in jobs("demo")] == ["dpo", "simpo", "mmpo"]
    assert {config["optimizer"]["lr"] for config in configs} == {5e-5}


@pytest.mark.slow
def test_a_sweep_file_runs_from_another_folder(overrides, tmp_path):
    """The command line wins over the file, and the file is found wherever the program is called."""
    arguments = ["-m", "+sweep=demo", *overrides("here"), "steps=1", "objective=dpo", "objective.beta=0.1,0.2"]
    process = run_program(*arguments, cwd=tmp_path)
    assert process.returncode == 0, process.stderr
    found = [r["config"]["objective"]["beta"] for r in records(tmp_path / "here")]
    assert sorted(found) == [0.1, 0.2]


@pytest.mark.parametrize(
    ("override", "value"),
    [("optimizer.lr=1e-6", 1e-6), ("optimizer.betas=[0.9,0.95]", [0.9, 0.95]), ("optimizer.eps=1e-8", 1e-8)],
)
def test_numbers_on_the_command_line_are_numbers(override, value):
    register(TrainConfig)
    with initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
        config = parse(compose("train", [override]), TrainConfig)
    assert getattr(config.optimizer, override.partition("=")[0].removeprefix("optimizer.")) == value


def test_another_application_of_hydra_does_not_get_our_sweep_files(tmp_path):
    """Hydra loads plugins of every package in the environment into every application."""
    found = []
    for folder in (ROOT / "conf", tmp_path):
        with initialize_config_dir(str(folder), version_base="1.3"):
            path = GlobalHydra.instance().config_loader().get_search_path().get_path()
        found.append([entry.path for entry in path if entry.provider == "prefopt"])
    assert found == [[f"file://{ROOT / 'sweeps'}"], []]
