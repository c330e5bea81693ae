"""Before the first step: does this model compute packed and prefix-shared rows correctly?"""

import logging
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel

import prefopt.data.collate
import prefopt.data.segments
from prefopt.data.collate import LAYOUTS, Group, Layout
from prefopt.data.tokenize import TokenizedPair
from prefopt.errors import UserError
from prefopt.models import chunked_logprobs, logprobs, packed_attention
from prefopt.models.fingerprint import loaded_model
from prefopt.models.logprobs import autocast, backbone, completion_logps, last_hidden_states, logit_cap
from prefopt.models.packed_attention import enable_packed_attention
from prefopt.tracking.record import find_result, write_result
from prefopt.utils.files import cache_dir
from prefopt.utils.fingerprint import fingerprint
from prefopt.utils.memory import is_out_of_memory
from prefopt.utils.tensor_store import hash_tokens

log = logging.getLogger(__name__)

# Nats per completion token (or units of a hidden state). Leaks between completions and wrong positions differ by far
# more.
TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}
LARGE_LOGITS = 100.0


def known_layout(
    name: str, model: PreTrainedModel, weights: str, pairs: Sequence[TokenizedPair], precision: str
) -> Layout:
    """`choose_layout`, or what it has found on this kind of processor for the same row, model and code, which all runs
    of a sweep have. It is kept in the user's cache folder. `weights`: the digest of the model's weights."""
    pair = longest(pairs)
    processor = torch.backends.cpu.get_cpu_capability()
    if model.device.type == "cuda":
        processor = torch.cuda.get_device_name(model.device)
    row = hash_tokens(pair.prompt, pair.chosen, pair.rejected).hex()
    compiled = any(module._compiled_call_impl is not None for module in model.modules())
    kernels = [processor, model.config._attn_implementation, compiled]
    decides = [*loaded_model(model, weights), name, precision, kernels, row]
    code = [choose_layout, logprobs, chunked_logprobs, packed_attention, prefopt.data.collate, prefopt.data.segments]
    file = cache_dir() / "layout" / f"{fingerprint(decides, *code)[:24]}.json"
    if found := find_result(file):
        layout, reason = LAYOUTS[found["layout"]], found["reason"]
        if layout.name == "packed":
            enable_packed_attention(model)
    else:
        layout, reason = check_layouts(name, model, pair, precision)
        write_result(file, {"layout": layout.name, "reason": reason})
    say_reason(layout, model, reason)
    return layout


def longest(pairs: Sequence[TokenizedPair]) -> TokenizedPair:
    return max(pairs, key=lambda p: len(p.prompt) + len(p.chosen) + len(p.rejected))


def say_reason(layout: Layout, model: PreTrainedModel, reason: str) -> None:
    if reason:
        log.info(f"  layout: {layout.name}, because {model.config.model_type} {reason}")


def choose_layout(
    name: str, model: PreTrainedModel, pairs: Sequence[TokenizedPair], precision: str = "float32"
) -> Layout:
    """The layout `name`, or the next simpler one in which the model computes the longest of `pairs` correctly. If it is
    another one, a message says why.

    Correct means: the same numbers as the model's ordinary forward pass on every completion alone. These are log-probs;
    of a reward model, whose head is zero at first, the last hidden states.

    On a CPU the comparison is made in float32. It is made in `precision` on a GPU, whose kernel for packed rows knows
    no float32, and for weights that are not float32.

    Raises UserError if not even padded rows give those numbers, and for a model that is not causal.
    """
    layout, reason = check_layouts(name, model, longest(pairs), precision)
    say_reason(layout, model, reason)
    return layout


@torch.no_grad()
def check_layouts(name: str, model: PreTrainedModel, pair: TokenizedPair, precision: str) -> tuple[Layout, str]:
    """The layout that `choose_layout` describes, by its numbers for `pair`; why it is another than `name`, or ""."""
    if model.device.type == "cpu" and all(p.dtype == torch.float32 for p in model.parameters()):
        precision = "float32"
    group = Group(pair.prompt, [c for c in (pair.chosen, pair.rejected) if c])
    original = model.config._attn_implementation
    names = list(LAYOUTS)  # from the fastest to the one that works with every model
    reason = ""
    with autocast(model.device, precision):
        try:
            expected = torch.stack([_expected_numbers(model, group.prompt, c) for c in group.completions], -1)
            if not expected.isfinite().all():
                raise UserError(
                    f"the {model.config.model_type} gives {expected.flatten()[0]:g} for a row of the data, so its "
                    "weights hold what is no number, or are too large. Get the checkpoint again."
                )
            check_causal(model, group.prompt + group.completions[0], TOLERANCE[precision])
            if not hasattr(model, "score"):
                check_logits(model, group.prompt)
        except (ValueError, TypeError, RuntimeError, AttributeError, KeyError, IndexError, AssertionError) as error:
            if is_out_of_memory(error):
                raise
            why = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise UserError(
                f"the {model.config.model_type} cannot compute a row of token ids alone ({why}), so it cannot be "
                "trained here. Use another model."
            ) from error
        for candidate in names[names.index(name) :]:
            try:
                if candidate == "packed":
                    enable_packed_attention(model)
                numbers = _numbers(model, LAYOUTS[candidate], group)
                lengths = numbers.new_tensor([len(c) for c in group.completions])
                difference = ((numbers - expected).abs() / lengths).max()
                if difference <= TOLERANCE[precision]:
                    return LAYOUTS[candidate], reason
                reason = f"gives other log-probs in a {candidate} row (by {difference.item():.2g} nats per token)"
            # What the code of an architecture raises for a mask or an argument that it does not know.
            except (ValueError, TypeError, RuntimeError, AttributeError, KeyError, ImportError) as error:
                if is_out_of_memory(error):  # it says nothing of the layout
                    raise
                reason = f"cannot read a {candidate} row ({str(error).splitlines()[0]})"
            if candidate == "packed":  # the other layouts take the model's own attention
                model.set_attn_implementation(original)
    raise UserError(
        f"prefopt cannot compute this model: {model.config.model_type} {reason}. It may change its logits after the "
        "output embedding in a way that prefopt does not know. Use another model."
    )


def check_causal(model: PreTrainedModel, row: list[int], tolerance: float) -> None:
    """Raise UserError for a model in which what stands later in a row changes what was computed before, as in an
    encoder (BERT) that is loaded as a language model: its "log-prob" of a token has seen the token."""
    whole = torch.tensor([row], device=model.device)
    half = len(row) // 2
    changed = whole.clone()
    # The same length, because some rotary embeddings depend on it.
    changed[:, half:] = (changed[:, half:] + 1) % cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings
    before, after = (_outputs(model, ids)[:half].float() for ids in (whole, changed))
    if not (after - before).abs().mean() <= tolerance * before.abs().mean():
        raise UserError(
            f"the {model.config.model_type} is no causal language model: its numbers for a token change with the "
            "tokens behind it. An encoder predicts a token with the token in sight. Use a decoder-only model."
        )


def check_logits(model: PreTrainedModel, row: list[int]) -> None:
    """Raise UserError for a model that does something else to its logits than `logit_cap` knows. It is looked for where
    it shows: on logits of up to 100, as large as those of a trained model. Small ones pass through a cap unchanged."""
    ids = torch.tensor([row], device=model.device)
    head = cast(torch.nn.Module, model.get_output_embeddings())
    plain = head(backbone(model)(input_ids=ids, use_cache=False).last_hidden_state[0]).float()
    factor = LARGE_LOGITS / plain.abs().max()
    hook = head.register_forward_hook(lambda module, inputs, output: factor.to(output.dtype) * output)
    try:
        found = _outputs(model, ids).float()
    finally:
        hook.remove()
    expected = logit_cap(model)(factor * plain)
    if not ((found - expected).abs().max() <= 0.05 * expected.abs().max()):
        raise UserError(
            f"prefopt cannot compute this model: {model.config.model_type} changes its logits after the output "
            "embedding, or its hidden states before it, in a way that prefopt does not know. Use another model."
        )


def _outputs(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """(T, vocabulary) logits of a row; of a reward model, (T, hidden) states. An ordinary forward pass."""
    if hasattr(model, "score"):
        return backbone(model)(input_ids=ids, use_cache=False).last_hidden_state[0]
    return model(input_ids=ids, use_cache=False).logits[0]


def _numbers(model: PreTrainedModel, layout: Layout, group: Group) -> Tensor:
    """What the model computes in a layout: (completions,) log-probs; of a reward model, (hidden, completions)."""
    batch = layout.make([group]).to(model.device)
    if hasattr(model, "score"):
        return last_hidden_states(model, batch).float().T
    return completion_logps(model, batch).sums


def _expected_numbers(model: PreTrainedModel, prompt: list[int], completion: list[int]) -> Tensor:
    """The same numbers for one completion, from an ordinary forward pass: one row, no mask, no positions."""
    row = torch.tensor([prompt + completion], device=model.device)
    if hasattr(model, "score"):
        return _outputs(model, row)[-1].float()
    logits = _outputs(model, row)[len(prompt) - 1 : -1].float()
    return -cross_entropy(logits, row[0, len(prompt) :], reduction="sum")
