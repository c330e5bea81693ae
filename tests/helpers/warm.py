"""What the programs import when they run, for tests/helpers/forks.py. Nothing is computed here: a process that has gone
backward once cannot be forked."""

import contextlib
import os
from importlib import import_module

os.environ["DS_ACCELERATOR"] = "cpu"

import torch

MODULES = """
prefopt.alpaca prefopt.arena prefopt.chat prefopt.compare prefopt.data_report prefopt.harness prefopt.mtbench
prefopt.online prefopt.papers prefopt.prefetch prefopt.report prefopt.reward_bench prefopt.runs prefopt.sample
prefopt.score prefopt.train
prefopt.training.checkpoint prefopt.data.cache prefopt.training.engine prefopt.generation.sampler
prefopt.training.loop prefopt.models.lora prefopt.models.load prefopt.models.layout_check
prefopt.models.reference prefopt.rewards.scorers datasets matplotlib.pyplot peft
transformers.models.llama.modeling_llama deepspeed
"""

for module in MODULES.split():
    with contextlib.suppress(ImportError):  # some belong to an extra
        import_module(module)
torch.set_num_threads(1)
