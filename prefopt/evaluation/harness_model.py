"""lm-eval's model of a checkpoint: how it is loaded, which weights it has, and how long its requests are."""

import os
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from prefopt.config.schema import ModelConfig
from prefopt.errors import UserError
from prefopt.evaluation.config import HarnessConfig
from prefopt.tracking.policies import Checkpoint

if TYPE_CHECKING:
    from lm_eval.models.huggingface import HFLM


def load(checkpoint: Checkpoint, config: HarnessConfig) -> "HFLM":
    """lm-eval's model of a checkpoint. It runs no code that comes with a model, and reads no pickles.

    lm-eval gives `generate` the task's own settings (of which greedy decoding is the default) and the longest length,
    and leaves the rest to the model's generation_config. That is taken away but for its stop tokens.
    """
    from lm_eval.models.huggingface import HFLM
    from transformers import GenerationConfig

    from prefopt.models.generation_config import stop_tokens
    from prefopt.models.load import checkpoint_path
    from prefopt.models.safe_weights import check_weights, no_pickles
    from prefopt.models.whole import whole_model

    with whole_model(checkpoint.model) as model, no_pickles(path := checkpoint_path(model)):
        check_weights(path, model.revision)
        lm = HFLM(
            pretrained=path,
            revision=model.revision or "main",
            tokenizer=tokenizer_of(checkpoint.model, config),
            dtype=config.precision,
            device=config.device,
            batch_size=config.batch_size,
            max_length=config.max_length,
            trust_remote_code=False,
            use_safetensors=True,
        )
    if config.batch_size == "auto" and config.device == "cpu":
        lm.max_batch_size = batch_for_memory(lm)
    stops = stop_tokens(lm.tokenizer, lm.model.config, lm.model.generation_config)
    lm.model.generation_config = GenerationConfig(eos_token_id=stops)
    return lm


def batch_for_memory(lm: "HFLM") -> int:
    """The largest batch, up to lm-eval's 64, whose logits fit into the free memory of this machine.

    lm-eval tries a batch out until it finds no memory. That works on a GPU. A CPU's allocator hands out what is not
    there, and the system ends the process.
    """
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    logits = 4 * lm.max_length * lm.config.vocab_size  # bytes of a text's, in float32
    return max(1, min(64, free // (4 * logits)))  # lm-eval has them twice; the same again for all else


def check_texts(model: ModelConfig, config: HarnessConfig) -> None:
    """Raise UserError where the tokenizer cannot be loaded, `max_length` is more than the model's, or the chat template
    leaves the system instruction out."""
    from lm_eval.models.utils import resolve_max_length
    from transformers import AutoConfig

    from prefopt.models.load import checkpoint_path

    tokenizer = tokenizer_of(model, config)
    if config.max_length is not None:
        own = AutoConfig.from_pretrained(checkpoint_path(model), revision=model.revision, trust_remote_code=False)
        longest = resolve_max_length(own, default=config.max_length)
        if config.max_length > longest:
            raise UserError(f"max_length={config.max_length} is above the {longest} tokens that {model.path} reads")
    if config.chat_template and config.system_instruction:
        chat = [{"role": "system", "content": config.system_instruction}, {"role": "user", "content": "Hello"}]
        try:
            text = tokenizer.apply_chat_template(chat, tokenize=False)
        except TemplateError:  # lm-eval then leaves the system message out
            text = ""
        if config.system_instruction.strip() not in text:
            raise UserError(
                f"the chat template of {model.path} writes no system message, so system_instruction would be left out. "
                "Leave it out yourself, or set model.system_message=merge"
            )


def tokenizer_of(model: ModelConfig, config: HarnessConfig) -> Any:
    """The tokenizer for lm-eval, where it needs another than it finds beside the model; else None. Raises UserError
    where it cannot be loaded."""
    if config.chat_template:  # with the template as the model's keys change it
        from prefopt.models.load import load_tokenizer

        return load_tokenizer(model)
    if model.tokenizer:
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(model.tokenizer, trust_remote_code=False)
        except Exception as error:  # reading a foreign file may raise anything
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(f"model.tokenizer={model.tokenizer} cannot be loaded: {reason}") from None
    return None


def check_weights(checkpoint: Checkpoint, config: HarnessConfig) -> None:
    """Raise UserError where a run's policy holds other weights than the run has recorded.

    The digest in the record is of float32 weights, so these are read for it, in whatever precision they are evaluated.
    """
    from prefopt.models.load import load_model, weights_digest

    if checkpoint.weights is None:
        return
    if weights_digest(load_model(checkpoint.model, "cpu")) != checkpoint.weights:
        raise UserError(
            f"{checkpoint.path} does not hold the weights that its run={config.run} has recorded: they were changed "
            "since. Bring the old files back, or evaluate the folder as a model of its own: model=hub "
            f"model.path={checkpoint.path} output=FOLDER"
        )


def weights_of(lm: "HFLM") -> str:
    """The digest of the weights in the precision of the evaluation. In float32 it is the one in the run's record."""
    from prefopt.models.load import weights_digest

    return weights_digest(lm.model)


class RequestCounts:
    """Counts the requests to `lm` until `stop`, and those longer than the model, which lm-eval cuts from the left.
    Notes the sizes of batches that lm-eval finds."""

    def __init__(self, lm: "HFLM"):
        self.n = self.cut = 0
        self.batch_sizes: list[int] = []  # that lm-eval has found for batch_size=auto
        self._lm, self._score, self._encode = lm, lm._loglikelihood_tokens, lm.tok_batch_encode
        self._detect = lm._detect_batch_size
        lm._loglikelihood_tokens = self._count_scored
        lm.tok_batch_encode = self._count_generated
        lm._detect_batch_size = self._note_batch_size
        lm.batch_sizes = {}  # those of another task, which had shorter requests perhaps

    def stop(self) -> None:
        self._lm._loglikelihood_tokens = self._score
        self._lm.tok_batch_encode = self._encode
        self._lm._detect_batch_size = self._detect

    def _note_batch_size(self, *arguments: Any) -> int:
        self.batch_sizes.append(self._detect(*arguments))
        return self.batch_sizes[-1]

    def _count_scored(self, requests: Any, **settings: Any) -> Any:
        longest = self._lm.max_length
        for _, context, continuation in requests:
            if len(continuation) > longest:
                raise UserError(
                    f"a text to be scored has {len(continuation)} tokens, and the model reads {longest}: this task "
                    "needs a model of longer contexts"
                )
            self.n += 1
            self.cut += len(context) + len(continuation) > longest + 1
        return self._score(requests, **settings)

    def _count_generated(self, strings: Any, *, left_truncate_len: int | None = None, **settings: Any) -> Any:
        ids, mask = self._encode(strings, **settings)
        self.n += len(strings)
        if left_truncate_len is None:
            return ids, mask
        self.cut += int((mask.sum(1) > left_truncate_len).sum())
        return ids[:, -left_truncate_len:], mask[:, -left_truncate_len:]


def first_request(lm: "HFLM", sample: dict[str, Any]) -> dict[str, Any]:
    """The token ids of a sample as the model reads them: the context, and for a loglikelihood the continuation. In a
    record they show how chat template and special tokens were applied."""
    context, *rest = sample["arguments"][0]
    if not rest:  # a text of a perplexity task; its first window begins so
        return {"context": [lm.prefix_token_id], "continuation": lm.tok_encode(context)}
    if not isinstance(rest[0], str):
        return {"context": lm.tok_encode(context)}
    if not context:
        return {"context": [lm.prefix_token_id], "continuation": lm.tok_encode(rest[0], add_special_tokens=False)}
    context_ids, continuation_ids = lm._encode_pair(context, rest[0])
    return {"context": context_ids, "continuation": continuation_ids}
