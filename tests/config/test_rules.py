"""What the nodes of a config refuse by themselves, and how `parse` names it."""

import pytest
from omegaconf import OmegaConf

from prefopt.config.parse import parse
from prefopt.config.schema import (
    EngineConfig,
    MultiReferenceConfig,
    OptimizerConfig,
    PeftConfig,
    ReferenceSyncConfig,
    SamplingConfig,
    ServerConfig,
    WandbConfig,
)
from prefopt.errors import UserError
from prefopt.objectives.dpo import DPO
from prefopt.objectives.sft import SFT
from prefopt.training.config import OnlineConfig, TrainConfig, train_problems

GOOD = {
    OptimizerConfig: {"lr": 1e-3, "betas": [0.9, 0.99], "eps": 1e-8, "weight_decay": 0.0, "max_grad_norm": 1.0},
    PeftConfig: {"target_modules": ["q_proj"], "r": 4, "alpha": 8, "dropout": 0.0, "quantize": False},
    EngineConfig: {"name": "single", "offload_optimizer": False, "hang_s": 60.0},
    WandbConfig: {"project": "p", "mode": "offline"},
    ServerConfig: {"command": "vllm serve {model} --port {port}", "url": "http://here:{port}/v1", "timeout": 60.0},
    MultiReferenceConfig: {"models": ["a"]},
    ReferenceSyncConfig: {"every": 512},
    SamplingConfig: {"temperature": 1.0, "top_p": 1.0, "max_new_tokens": 8, "batch_size": 4},
}
BAD = [
    (OptimizerConfig, {"lr": 0.0}, "lr must be positive, is 0.0"),
    (OptimizerConfig, {"betas": [0.9]}, "betas must be two numbers"),
    (OptimizerConfig, {"betas": [0.9, 1.0]}, "betas must be two numbers"),
    (OptimizerConfig, {"eps": 0.0}, "eps must be positive"),
    (OptimizerConfig, {"weight_decay": -0.1}, "weight_decay must not be negative"),
    (OptimizerConfig, {"max_grad_norm": -1.0}, "max_grad_norm must not be negative"),
    (PeftConfig, {"r": 0}, "r must be at least 1"),
    (PeftConfig, {"alpha": 0}, "alpha must be at least 1"),
    (PeftConfig, {"dropout": 1.0}, "dropout must be in"),
    (PeftConfig, {"quantize": True, "target_modules": []}, "quantize freezes the weights"),
    (EngineConfig, {"name": "zero3"}, "name must be single, zero2 or fsdp, is 'zero3'"),
    (EngineConfig, {"hang_s": 0.0}, "hang_s must be positive"),
    (EngineConfig, {"offload_optimizer": True}, "offload_optimizer: only engine=zero2 can"),
    (WandbConfig, {"mode": "disabled"}, "mode must be offline or online, is 'disabled'"),
    (MultiReferenceConfig, {"mean": "arithmetic"}, "mean must be harmonic or geometric"),
    (MultiReferenceConfig, {"clip": 1.0}, "clip must be in"),
    (MultiReferenceConfig, {"weights": [1.0]}, "weights must be 2"),
    (MultiReferenceConfig, {"weights": [1.0, 0.5]}, "weights must add up to 1, add up to 1.5"),
    (MultiReferenceConfig, {"weights": [1.3, -0.3]}, "weights must not be negative where the mean is harmonic"),
    (ReferenceSyncConfig, {"every": 0}, "every must be at least 1 step"),
    (ReferenceSyncConfig, {"alpha": 0.0}, "alpha must be above 0"),
    (SamplingConfig, {"temperature": -1.0}, "temperature must not be negative"),
    (SamplingConfig, {"top_p": 0.0}, "top_p must be above 0"),
    (SamplingConfig, {"top_p": 1.1}, "top_p must be above 0"),
    (SamplingConfig, {"max_new_tokens": 0}, "max_new_tokens must be at least 1"),
    (SamplingConfig, {"batch_size": 0}, "batch_size must be at least 1"),
    (ServerConfig, {"command": None}, "url must be that of a server that runs"),
    (ServerConfig, {"command": "vllm serve here --port {port}"}, r"command must name \{model\}"),
    (ServerConfig, {"command": "vllm serve {model}"}, r"command and url must both name \{port\}"),
    (ServerConfig, {"timeout": 0.0}, "timeout must be positive"),
]
TRAIN = {
    "model": {"name": "m", "path": "m"},
    "dataset": {"name": "d"},
    "objective": {},
    "schedule": {},
    "launcher": {},
    "engine": GOOD[EngineConfig],
    "peft": GOOD[PeftConfig],
    "optimizer": GOOD[OptimizerConfig],
    "sampling": GOOD[SamplingConfig] | {"prompts": 8},
    "logger": {"progress": False, "wandb": GOOD[WandbConfig]},
    "steps": 4,
    "layout": "packed",
    "logits": "tiled",
    "reference": "cached",
    "nonfinite": "stop",
    "export_dtype": "float32",
    "precision": "float32",
    "device": "cpu",
    "runs_dir": "runs",
    "compile": False,
    "gradient_checkpointing": False,
    "keep_checkpoint": True,
    "merge_adapter": False,
    "micro_batch_tokens": 0,
    "seed": 0,
} | dict.fromkeys(
    ("batch_size", "eval_every", "save_every", "exports", "max_prompt_tokens", "max_completion_tokens"), 1
)
ONLINE = TRAIN | {
    "scorer": {},
    "prompts": "prompts.jsonl",
    "stages": 2,
    "samples_per_prompt": 2,
    "stage_sampling": GOOD[SamplingConfig],
    "backend": "transformers",
    "server": GOOD[ServerConfig],
    "stage_reference": "initial",
    "stage_momentum": 0.3,
}


@pytest.mark.parametrize("schema", GOOD)
def test_good_values_are_accepted(schema):
    schema(**GOOD[schema])


@pytest.mark.parametrize(("schema", "changes", "message"), BAD)
def test_a_node_refuses_a_bad_value(schema, changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        schema(**GOOD[schema] | changes)


def test_a_node_names_all_its_bad_values():
    with pytest.raises(ValueError, match="lr must be") as error:
        OptimizerConfig(**GOOD[OptimizerConfig] | {"lr": 0.0, "eps": 0.0})
    assert [line.split()[0] for line in str(error.value).splitlines()] == ["lr", "eps"]


def test_a_node_with_values_still_missing_is_not_judged():
    OptimizerConfig(lr=-1.0)
    OmegaConf.structured(TrainConfig)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *((key, 0) for key in ("batch_size", "exports", "max_prompt_tokens")),
        *((key, 0) for key in ("max_completion_tokens", "heldout_pairs", "patience", "steps", "epochs")),
        *((key, -1) for key in ("micro_batch_tokens", "seed", "squeeze_alarm", "eval_every", "save_every")),
        *((key, "nonsense") for key in ("layout", "logits", "reference", "nonfinite")),
        ("seed", 2**32),
    ],
)
def test_a_run_refuses_a_bad_value(key, value):
    assert parse(OmegaConf.create(TRAIN), TrainConfig).total_steps == 4
    with pytest.raises(UserError, match=f"^{key} must "):
        parse(OmegaConf.create(TRAIN | {key: value}), TrainConfig)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reference": "cached"}, "reference_sync moves the reference, and reference=cached"),
        ({"reference_model": "m"}, "reference_sync and reference_model do not go together"),
        ({"engine": GOOD[EngineConfig] | {"name": "fsdp"}}, "leave engine=single"),
        ({"peft": GOOD[PeftConfig]}, "below an adapter these do not change"),
    ],
)
def test_a_reference_that_moves_is_a_whole_one_in_memory(changes, message):
    good = TRAIN | {"reference": "resident", "reference_sync": {"every": 2}}
    good["peft"] = GOOD[PeftConfig] | {"target_modules": []}
    assert train_problems(parse(OmegaConf.create(good), TrainConfig)) == []
    (problem,) = train_problems(parse(OmegaConf.create(good | changes), TrainConfig))
    assert message in problem


@pytest.mark.parametrize(
    ("objective", "adapter", "lr"),
    [(SFT(), False, 2e-5), (SFT(), True, 2e-4), (DPO(beta=0.1), False, 1e-6), (DPO(beta=0.1), True, 1e-5)],
)
def test_what_is_not_given_is_one_epoch_at_the_objectives_learning_rate(objective, adapter, lr):
    targets = {"peft": GOOD[PeftConfig] | {"target_modules": ["q_proj"] * adapter}}
    lengths = {"steps": None, "batch_size": 8, "eval_every": 0, "save_every": 0}
    nothing = TRAIN | lengths | targets | {"optimizer": GOOD[OptimizerConfig] | {"lr": None}}
    config = parse(OmegaConf.create(nothing), TrainConfig)
    config.fill(objective)
    assert (config.optimizer.lr, config.epochs) == (lr, 1)
    config.count_steps(pairs=8 * 99 + 1)
    assert (config.steps, config.eval_every, config.save_every) == (100, 10, 10)

    given = parse(OmegaConf.create(TRAIN), TrainConfig)
    given.fill(objective)
    assert (given.steps, given.epochs, given.optimizer.lr) == (4, None, GOOD[OptimizerConfig]["lr"])


@pytest.mark.parametrize(("key", "value"), [("stages", 0), ("samples_per_prompt", 1), ("stage_reference", "x")])
def test_an_online_run_refuses_a_bad_value(key, value):
    assert parse(OmegaConf.create(ONLINE), OnlineConfig).stages == 2
    with pytest.raises(UserError, match=f"^{key} must "):
        parse(OmegaConf.create(ONLINE | {key: value}), OnlineConfig)


def test_bad_values_of_all_nodes_are_named_at_once_by_their_whole_keys():
    changes = {
        "stages": 0,
        "steps": 0,
        "optimizer": {"lr": 0.0, "eps": 0.0},
        "stage_sampling": {"top_p": 2.0},
        "logger": {"wandb": {"mode": "x"}},
    }
    with pytest.raises(UserError) as error:
        parse(OmegaConf.merge(ONLINE, changes), OnlineConfig)
    keys = [line.split()[0] for line in str(error.value).splitlines()]
    assert sorted(keys) == [
        "logger.wandb.mode",
        "optimizer.eps",
        "optimizer.lr",
        "stage_sampling.top_p",
        "stages",
        "steps",
    ]
