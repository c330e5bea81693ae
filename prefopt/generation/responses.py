"""Responses to many prompts, resumable at every batch."""

import contextlib
import importlib.metadata
import json
from collections.abc import Sequence
from pathlib import Path

from prefopt.config.schema import ModelConfig, SamplingConfig
from prefopt.data.formats import Message, as_prompt
from prefopt.data.sources import Row, read_rows
from prefopt.errors import Interrupted, UserError
from prefopt.utils import signals
from prefopt.utils.console import Bar, say
from prefopt.utils.files import with_filename
from prefopt.utils.fingerprint import fingerprint


def read_prompts(path: str, split: str | None) -> tuple[list[Row], list[list[Message]]]:
    """The rows, and the prompt of each. Raises UserError for a row without one."""
    rows, prompts = [], []
    for where, row in read_rows(path, split):
        try:
            prompts.append(as_prompt(row["prompt"]))
        except KeyError:
            raise UserError(f"{where} has no field 'prompt' (its fields: {', '.join(row) or 'none'}).") from None
        except ValueError as error:
            raise UserError(f"{where}: {error}. Mend the row, or leave it out.") from None
        rows.append(row)
    return rows, prompts


def generate_resumable(
    model_config: ModelConfig,
    prompts: Sequence[list[Message]],
    sampling: SamplingConfig,
    n: int,
    seed: int,
    backend: str,
    device: str,
    precision: str,
    partial: Path,
    show: bool = True,
) -> tuple[list[Row], str]:
    """{"responses", "finished"} of each prompt, and the digest of the weights that gave them. `partial`: the file that
    keeps them as they come, which the caller removes once they are safe; or a folder where they stay, named by all that
    decides them, for whoever asks for the same.

    Raises UserError where that file was begun with other settings, prompts or weights, and stop.Interrupted between
    two prompts after SIGTERM or SIGUSR2.
    """
    # Imported here, so that bad input is refused before transformers is loaded.
    from prefopt.data.tokenize import encode_prompt
    from prefopt.generation import sampler as sampler_module
    from prefopt.generation.sampler import transformers_sampler, vllm_sampler
    from prefopt.models.load import load_tokenizer
    from prefopt.utils.locks import locked

    signals.install_handlers()
    tokenizer = load_tokenizer(model_config)
    make = vllm_sampler if backend == "vllm" else transformers_sampler
    sampler, weights, architecture = make(model_config, tokenizer, device, precision)
    encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
    versions = [importlib.metadata.version(p) for p in ("torch", "transformers")]
    decides = [sampling, n, seed, backend, precision, device, weights, architecture, encoded, versions]
    digest = fingerprint(decides, sampler_module)
    with contextlib.ExitStack() as stack:
        if partial.is_dir():
            partial = partial / f"{digest[:24]}.jsonl"
            stack.enter_context(locked(partial.with_suffix(".lock"), "responses"))
        found = _read_partial(partial, digest)
        if found:
            say(f"  going on after {len(found)} of {len(prompts)} prompts ({partial})")
        # Of similar length together; which prompts share a batch does not depend on where an earlier sitting ended.
        order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
        size = max(1, sampling.batch_size // n)
        chunks = [order[i : i + size] for i in range(0, len(order), size)]
        partial.parent.mkdir(parents=True, exist_ok=True)
        with (
            with_filename(partial),
            partial.open("a") as file,
            Bar("sampling", len(prompts), show, done=len(found)) as bar,
        ):
            if not partial.stat().st_size:
                file.write(json.dumps({"settings": digest}) + "\n")
            for chunk in chunks:
                missing = [i for i in chunk if i not in found]
                if not missing:
                    continue
                if signals.stop_requested():
                    raise Interrupted(f"{len(found)} of {len(prompts)} prompts have their responses")
                # The whole chunk, where a part of it is there: what is drawn together is the same in every sitting.
                drawn = dict(zip(chunk, sampler([prompts[i] for i in chunk], sampling, seed, n), strict=True))
                for i in missing:
                    found[i] = {"responses": [s.text for s in drawn[i]], "finished": [s.finished for s in drawn[i]]}
                    file.write(json.dumps({"prompt": i, **found[i]}, ensure_ascii=False) + "\n")
                file.flush()
                bar.advance(by=len(missing))
        return [found[i] for i in range(len(prompts))], weights


def _read_partial(partial: Path, digest: str) -> dict[int, Row]:
    if not partial.is_file():
        return {}
    lines = partial.read_bytes().splitlines(keepends=True)
    whole = [line for line in lines if line.endswith(b"\n")]
    if not whole:
        partial.unlink()
        return {}
    if whole[0] != json.dumps({"settings": digest}).encode() + b"\n":
        raise UserError(
            f"{partial} was begun with other settings, prompts or weights. Repeat that command to finish it, or remove "
            "the file to begin again."
        )
    if len(whole) < len(lines):  # what a killed process left of a line
        partial.write_bytes(b"".join(whole))
    rows = [json.loads(line) for line in whole[1:]]
    return {row.pop("prompt"): row for row in rows}
