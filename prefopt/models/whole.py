"""A model as one folder, for programs that load models themselves."""

import contextlib
import tempfile
from collections.abc import Iterator

from prefopt.config.schema import ModelConfig
from prefopt.models.load import load_model, load_tokenizer


@contextlib.contextmanager
def whole_model(config: ModelConfig) -> Iterator[ModelConfig]:
    """The model as it is; with an adapter, merged into a folder that is there inside of this context (in $TMPDIR, in
    float32). Raises UserError as `load_model` does."""
    if config.adapter is None:
        yield config
        return
    with tempfile.TemporaryDirectory(prefix="prefopt-merged-") as folder:
        load_model(config, "cpu").save_pretrained(folder)
        load_tokenizer(config).save_pretrained(folder)
        yield config.exported(folder)
