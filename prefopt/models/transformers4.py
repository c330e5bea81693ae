"""An export in the words of transformers 4, too, for what is built on it (vLLM, llama.cpp's converter, at many sites).

transformers 5 keeps everything about rotary positions in `rope_parameters`. Version 4 does not know that key: it takes
its default of `rope_theta`, without a warning, and computes another model. Where both spellings stand, version 4 reads
its own and version 5 gets the same configuration as from `rope_parameters` alone.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from prefopt.utils.files import atomic_write, write_plain_json

log = logging.getLogger(__name__)

# The rest of `rope_parameters` is called `rope_scaling`; these two stand beside it.
BESIDE = ("rope_theta", "partial_rotary_factor")
# Names that the configurations of single families have in version 4.
THETA = {"gpt_neox": "rotary_emb_base", "gpt_neox_japanese": "rotary_emb_base"}
FACTOR = {"gpt_neox": "rotary_pct", "gpt_neox_japanese": "rotary_pct"}
LONGROPE = ("phi3", "phi4_multimodal")  # these take three keys, and the type under its oldest name
LOCAL_THETA = {"gemma3_text": "rope_local_base_freq", "gemma3n_text": "rope_local_base_freq"}


def write_for_transformers4(folder: Path) -> None:
    """Add version 4's spelling to config.json and tokenizer_config.json in `folder`, where they are (in place)."""
    write_rope(folder)
    write_tokenizer(folder)


def write_rope(folder: Path) -> None:
    """Add version 4's keys of rotary positions to config.json, unless version 5 would read another model from it."""
    file = folder / "config.json"
    if not file.is_file():
        return
    original = file.read_text()
    values = json.loads(original)
    parts = list(parts_with_rope(values))
    if not parts:
        return
    before = AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    for part in parts:
        part |= rope(part)
    write_plain_json(file, values)
    after = AutoConfig.from_pretrained(folder, trust_remote_code=False).to_dict()
    if not holds(after, before):
        atomic_write(file, original)
        log.warning(
            f"  the export has transformers 5's names of rotary positions alone: with those of version 4 beside them, "
            f"{values.get('model_type')} would be read as another model. Do not use it with transformers 4."
        )


def rope(part: dict[str, Any]) -> dict[str, Any]:
    """Version 4's keys for the `rope_parameters` of a configuration. Of parameters by layer type, it knows two: those
    of full attention and the base of sliding attention."""
    parameters = part["rope_parameters"]
    family = part.get("model_type", "")
    keys: dict[str, Any] = {}
    if any(isinstance(value, dict) for value in parameters.values()):
        sliding = parameters.get("sliding_attention") or {}
        if "rope_theta" in sliding and family in LOCAL_THETA:
            keys[LOCAL_THETA[family]] = sliding["rope_theta"]
        parameters = parameters.get("full_attention") or {}
    if not parameters:
        return keys
    if "rope_theta" in parameters:
        keys[THETA.get(family, "rope_theta")] = parameters["rope_theta"]
    if "partial_rotary_factor" in parameters:
        keys[FACTOR.get(family, "partial_rotary_factor")] = parameters["partial_rotary_factor"]
    rest = {key: value for key, value in parameters.items() if key not in BESIDE}
    if family in LONGROPE and rest.get("rope_type") == "longrope":
        rest = {"type": "longrope"} | {key: rest[key] for key in ("short_factor", "long_factor")}
    plain = rest.keys() <= {"rope_type", "type"} and "default" in rest.values()
    keys["rope_scaling"] = None if plain or not rest else rest
    return keys


def parts_with_rope(values: Any) -> Iterator[dict[str, Any]]:
    """`values` and every configuration inside of it that has `rope_parameters`."""
    if isinstance(values, dict):
        if isinstance(values.get("rope_parameters"), dict):
            yield values
        for key, value in values.items():
            if key != "rope_parameters":
                yield from parts_with_rope(value)


def holds(values: Any, expected: Any) -> bool:
    """Whether `values` is `expected`, but for keys that stand in dictionaries in addition."""
    if isinstance(values, dict) and isinstance(expected, dict):
        return all(key in values and holds(values[key], value) for key, value in expected.items())
    return bool(values == expected)


def write_tokenizer(folder: Path) -> None:
    """Version 5 calls a tokenizer that is all in tokenizer.json a TokenizersBackend, and takes the old name for it;
    and it lists further special tokens as version 4 does not."""
    file = folder / "tokenizer_config.json"
    if not file.is_file():
        return
    values = json.loads(file.read_text())
    before = dict(values)
    if values.get("tokenizer_class") == "TokenizersBackend":
        values["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(values.get("extra_special_tokens"), list):
        values["additional_special_tokens"] = values.pop("extra_special_tokens")
    if values != before:
        write_plain_json(file, values)
