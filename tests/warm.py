"""What the programs import when they run, for tests/forks.py. Nothing is computed here: a process that has gone
backward once cannot be forked."""

import contextlib
import os

os.environ["DS_ACCELERATOR"] = "cpu"

import torch
import transformers.models.llama.modeling_llama  # noqa: F401

import prefopt.checkpoint
import prefopt.data.cache
import prefopt.data.dataset
import prefopt.engine
import prefopt.generate
import prefopt.loop
import prefopt.models.adapter
import prefopt.models.load
import prefopt.models.probe
import prefopt.models.reference
import prefopt.online
import prefopt.posthoc.oracle
import prefopt.runs
import prefopt.sample
import prefopt.score
import prefopt.train  # noqa: F401

with contextlib.suppress(ImportError):
    import deepspeed  # noqa: F401

torch.set_num_threads(1)
