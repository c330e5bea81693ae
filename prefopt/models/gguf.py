"""A GGUF file as a plain float32 checkpoint."""

import logging
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from prefopt.data.sources import digest
from prefopt.errors import UserError
from prefopt.models.safe_weights import load_pretrained, no_pickles
from prefopt.utils.files import cache_dir
from prefopt.utils.store import opened

log = logging.getLogger(__name__)


def convert_gguf(gguf: Path) -> Path:
    """The folder of a float32 checkpoint with the weights and the tokenizer of a GGUF file. It is made once, in the
    user's cache folder. Raises UserError for a file that cannot be read."""
    target = cache_dir() / "models" / f"{gguf.stem}-{digest(str(gguf))[:16]}"
    return opened(target, f"the conversion of {gguf.name}", lambda folder: _convert(gguf, folder))


def _convert(gguf: Path, folder: Path) -> None:
    log.info(f"converting {gguf.name} to a float32 checkpoint (once; about 20 s for 135M parameters)")
    transformers_logging.disable_progress_bar()
    try:
        loaded = load_pretrained(AutoModelForCausalLM, str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32)
    except (MemoryError, UserError):
        raise
    except Exception as error:  # reading a foreign file may raise anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"model file {gguf} cannot be read: {reason}. Get it again, or give another model.") from None
    # transformers refuses to save a model that was loaded from GGUF, so a new one made from its config takes the
    # weights.
    config = loaded.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.save_pretrained(folder)
    with no_pickles(str(gguf)):
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(folder)
