"""The same training in TRL and here: TRL's trainers with their own loop and AdamW against `train_step`, on the same
pairs in the same order. `settings` are an objective's hyperparameters as TRL names them.
"""

import copy
from pathlib import Path
from typing import Any

import pytest
from torch.optim.lr_scheduler import LambdaLR

from prefopt.config.schema import OptimizerConfig
from prefopt.data.formats import Pairs
from prefopt.data.sampler import step_indices
from prefopt.data.sources import read_rows
from prefopt.objectives.dpo import DPO
from prefopt.objectives.ipo import IPO
from prefopt.objectives.simpo import SimPO
from prefopt.training.state import TrainState
from prefopt.training.step import train_step
from tests.helpers.tiny import tiny_tokenizer
from tests.training.test_loop import make_train_state

# TRL 1.16 asks transformers for a name that is going to be renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

STEPS, BATCH_SIZE, MICRO_BATCH_SIZE = 10, 4, 2
# Weight decay at work, and a norm that clips some steps and not others.
OPTIMIZER = OptimizerConfig(lr=2e-3, betas=[0.9, 0.99], eps=1e-8, weight_decay=0.1, max_grad_norm=2.0)

# ChatML without the newline behind the last terminator. TRL trains on whatever the template writes behind it (and
# CPOTrainer then adds a second terminator, because the sequence does not end with one); prefopt drops it.
CHATML_ENDING_WITH_TERMINATOR = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' }}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def trl_trainer(method: str, settings: dict[str, Any], train_state: TrainState, indices: list[int], folder: Path):
    """TRL's trainer for the steps of `train_state`, from the same weights, on the pairs `indices` of pairs.jsonl."""
    # Imported here because it takes seconds.
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer
    from trl.experimental.cpo import CPOConfig, CPOTrainer

    pairs = [Pairs()(row) for _, row in read_rows(str(folder / "pairs.jsonl"))]
    rows = [
        {
            "prompt": pairs[i].prompt,
            "chosen": [{"role": "assistant", "content": pairs[i].chosen}],
            "rejected": [{"role": "assistant", "content": pairs[i].rejected}],
        }
        for i in indices
    ]
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = CHATML_ENDING_WITH_TERMINATOR
    config, optimizer = train_state.config, train_state.config.optimizer
    settings = settings | {
        "num_train_epochs": 1,
        "train_sampling_strategy": "sequential",
        # The loss of an optimizer step is the mean of its micro-batches' means: over its pairs, since these are equal.
        "per_device_train_batch_size": MICRO_BATCH_SIZE,
        "gradient_accumulation_steps": config.batch_size // MICRO_BATCH_SIZE,
        "learning_rate": optimizer.lr,
        "adam_beta1": optimizer.betas[0],
        "adam_beta2": optimizer.betas[1],
        "adam_epsilon": optimizer.eps,
        "weight_decay": optimizer.weight_decay,
        "max_grad_norm": optimizer.max_grad_norm,
        "seed": config.seed,
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "output_dir": str(folder / "trl"),
        "save_strategy": "no",
        "logging_steps": 1,
        "report_to": "none",
        "disable_tqdm": True,
    }
    arguments = {
        "model": copy.deepcopy(train_state.reference.frozen).requires_grad_(True),
        "train_dataset": Dataset.from_list(rows),
        "processing_class": tokenizer,
    }
    if method == "dpo":
        trainer = DPOTrainer(
            args=DPOConfig(**settings), ref_model=copy.deepcopy(train_state.reference.frozen), **arguments
        )
    else:
        trainer = CPOTrainer(args=CPOConfig(**settings), **arguments)
    # TRL's own AdamW, but our schedule: at step s of a warm-up of w steps transformers has s / w of the peak, so its
    # first step moves nothing, where `Cosine` has (s + 1) / w. After the warm-up both are the same.
    trainer.lr_scheduler = LambdaLR(trainer.create_optimizer(), lambda step: train_state.schedule(step, config.steps))
    return trainer


def token_ids(row: dict[str, Any]) -> tuple[list[int], list[int], list[int]]:
    """Prompt, chosen and rejected of a row that DPOTrainer or CPOTrainer has tokenized."""
    if "prompt_ids" in row:
        return row["prompt_ids"], row["chosen_ids"], row["rejected_ids"]
    chosen, rejected = ([i for i in row[f"{side}_labels"] if i != -100] for side in ("chosen", "rejected"))
    return row["prompt_input_ids"], chosen, rejected


@pytest.mark.parametrize(
    ("objective", "method", "settings"),
    [
        pytest.param(DPO(beta=0.1), "dpo", {"loss_type": "sigmoid", "beta": 0.1}, id="dpo"),
        pytest.param(IPO(beta=0.4, length_normalize=True), "dpo", {"loss_type": "ipo", "beta": 0.4}, id="ipo"),
        pytest.param(
            SimPO(beta=2.0, gamma_beta_ratio=0.3),
            "cpo",
            {"loss_type": "simpo", "beta": 2.0, "simpo_gamma": 0.6, "cpo_alpha": 0.0},
            id="simpo",
        ),
    ],
)
def test_the_loss_curve_is_that_of_trl(objective, method, settings, tmp_path):
    sizes = {"steps": STEPS, "batch_size": BATCH_SIZE}
    train_state = make_train_state(objective, tmp_path, optimizer=OPTIMIZER, **sizes)
    indices = [
        i
        for step in range(STEPS)
        for i in step_indices(len(train_state.train_pairs), train_state.config.seed, step, BATCH_SIZE)
    ]
    trainer = trl_trainer(method, settings, train_state, indices, tmp_path)
    ordered = [train_state.train_pairs[i] for i in indices]
    assert [token_ids(row) for row in trainer.train_dataset] == [(p.prompt, p.chosen, p.rejected) for p in ordered]

    trainer.train()
    theirs = [row for row in trainer.state.log_history if "loss" in row]
    ours = [train_step(train_state, step, train_state.step_micro_batches(step)) for step in range(STEPS)]

    assert [row["learning_rate"] for row in theirs] == pytest.approx([row["lr"] for row in ours])
    assert [row["loss"] for row in theirs] == pytest.approx([row["loss"] for row in ours], rel=0, abs=1e-5)
    assert [row["grad_norm"] for row in theirs] == pytest.approx([row["gradient_norm"] for row in ours], rel=1e-4)
    # The comparison means something: the loss moved, and clipping took part.
    assert ours[-1]["loss"] < 0.7 * ours[0]["loss"]
    norms = [row["gradient_norm"] for row in ours]
    assert min(norms) < OPTIMIZER.max_grad_norm < max(norms)
