"""Responses to many prompts. An interrupted call goes on at the batch where it stopped."""

import contextlib
import functools
import importlib.metadata
import logging
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefopt.config.schema import ModelConfig, SamplingConfig, ServerConfig
from prefopt.data.fields import as_prompt
from prefopt.data.formats import ImplicitPrompt
from prefopt.data.items import Dropped, Message
from prefopt.data.sources import Row, read_rows
from prefopt.errors import Interrupted, UserError
from prefopt.utils import signals
from prefopt.utils.console import Bar
from prefopt.utils.distributed import broadcast, is_main_process, map_shared, world_size
from prefopt.utils.files import atomic_write, with_filename
from prefopt.utils.fingerprint import fingerprint
from prefopt.utils.store import format_sealed_line, read_sealed_lines

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from prefopt.generation.sampler import Sample, Sampler

log = logging.getLogger(__name__)

GENERATION_PACKAGES = ("torch", "transformers")  # their versions decide responses


@dataclass(frozen=True)
class GenerationRequest:
    """`samples_per_prompt` responses of `model` to each of `prompts`. `device` and `precision` may not be auto. With
    backend=server there is `server`, and `server_log`, the file that keeps what it writes."""

    model: ModelConfig
    prompts: Sequence[list[Message]]
    sampling: SamplingConfig
    samples_per_prompt: int
    seed: int
    backend: str  # transformers or server
    device: str
    precision: str
    server: ServerConfig | None = None
    server_log: Path | None = None


class PartialFile:
    """The responses that have been sampled so far, as sealed JSON lines (`utils/store.py`).

    The first line is {"settings": digest}. Each other line is {"prompt": number, "responses", "finished"}, and is
    sealed with that digest. `rows` holds them by prompt number. Lines that are not whole are dropped. The last one may
    be torn, where a process was killed while it wrote; others are damaged, which the log says. Of a run's processes the
    main one reads and writes the file, and all know the rows.
    """

    def __init__(self, path: Path, digest: str):
        """Read the file, if there is one. Raises UserError where its settings have another digest."""
        self.path, self.digest = path, digest
        self.header = format_sealed_line({"settings": digest})
        self.rows: dict[int, Row] = broadcast(self._read() if is_main_process() else {})

    def _read(self) -> dict[int, Row]:
        path, digest = self.path, self.digest
        path.parent.mkdir(parents=True, exist_ok=True)
        data = path.read_bytes() if path.is_file() else b""
        headers, _ = read_sealed_lines(path)
        rows, _ = read_sealed_lines(path, digest)
        is_other = headers and headers[0] != {"settings": digest}
        if not rows and (is_other or (not headers and b"\n" in data)):
            raise UserError(
                f"{path} was begun with other settings, prompts or weights. Repeat that command to finish it, or "
                "remove the file to begin again."
            )
        kept = (self.header + "".join(format_sealed_line(row, digest) for row in rows)).encode() if rows else b""
        if data not in (kept, self.header.encode()):
            if not data.startswith(kept) or b"\n" in data.removeprefix(kept) or not data.strip(b"\0"):
                log.warning(f"  {path} is damaged: {len(rows)} of its lines are whole. The others are made anew.")
            atomic_write(path, kept)
        return {row.pop("prompt"): row for row in rows}

    def append(self, rows: dict[int, Row]) -> None:
        """Add the rows of further prompts. Raises OSError with the file's name where there is no room."""
        if is_main_process():
            lines = [format_sealed_line({"prompt": i, **row}, self.digest) for i, row in rows.items()]
            with with_filename(self.path), self.path.open("ab") as file:
                if file.tell() == 0:
                    lines.insert(0, self.header)
                file.write("".join(lines).encode())
                file.flush()
                os.fsync(file.fileno())
        self.rows |= rows


def read_prompts(path: str, split: str | None) -> tuple[list[Row], list[list[Message]]]:
    """The rows of a file, and the prompt of each: its field `prompt`, or what the conversations `chosen` and `rejected`
    of a preference pair have in common. Pairs that differ before their last turn are left out, and counted in the log.

    Raises UserError for a row without a prompt.
    """
    rows, prompts, without = [], [], 0
    for where, row in read_rows(path, split):
        try:
            if "prompt" not in row and all(isinstance(row.get(side), list) for side in ("chosen", "rejected")):
                pair = ImplicitPrompt()(row)
                if isinstance(pair, Dropped):
                    without += 1
                    continue
                prompts.append(pair.prompt)
            else:
                prompts.append(as_prompt(row["prompt"]))
        except KeyError:
            raise UserError(f"{where} has no field 'prompt' (its fields: {', '.join(row) or 'none'}).") from None
        except ValueError as error:
            raise UserError(f"{where}: {error}. Mend the row, or leave it out.") from None
        rows.append(row)
    if without:
        log.info(f"  {without} rows of {path} left out: their conversations differ before the last turn")
    return rows, prompts


# (request, the token ids of its prompts, the rows that are there already) -> the others, as they are drawn: each time
# some of them, or none. A collective.
Draw = Callable[[GenerationRequest, Sequence[list[int]], Mapping[int, Row]], Generator[dict[int, Row]]]


@dataclass(frozen=True)
class LoadedSampler:
    """A model, loaded to draw responses, and its tokenizer. `identity`: all of both that decides a response."""

    draw: Draw
    tokenizer: "PreTrainedTokenizerBase"
    weights: str  # their digest
    identity: list[Any]


@contextlib.contextmanager
def open_sampler(model: ModelConfig, backend: str, device: str, precision: str) -> Iterator[LoadedSampler]:
    """A sampler of the model, for several requests. `device` and `precision` may not be auto. The end of the context
    ends the server, which the first request starts."""
    # Imported here, so that bad input is refused before transformers is loaded.
    from prefopt.data.cache import tokenizer_digest
    from prefopt.models.load import load_tokenizer

    tokenizer = load_tokenizer(model)
    tokens = tokenizer_digest(tokenizer)
    if backend == "server":
        from prefopt.generation.server import ModelServer

        with ModelServer(model, tokenizer, precision) as served:
            yield LoadedSampler(served.draw, tokenizer, served.weights, [served.identity, tokens])
        return
    from prefopt.generation.sampler import transformers_sampler

    sampler, weights, identity = transformers_sampler(model, tokenizer, device, precision)
    yield LoadedSampler(functools.partial(draw_batches, sampler), tokenizer, weights, [identity, tokens])


def generate_resumable(
    request: GenerationRequest, partial: Path, show: bool = True, sampler: LoadedSampler | None = None
) -> tuple[list[Row], str]:
    """Sample responses, and keep them on disk as they come. A collective: the processes share the batches.

    Args:
        request: The model, the prompts and the settings.
        partial: The file that keeps the responses; the caller removes it once they are stored elsewhere. Or a folder
            that serves as a cache: the file in it is named by the digest of everything that decides the responses, and
            it stays there for the next caller with the same request.
        show: Show progress.
        sampler: The request's model, for several calls that are to load it once, or ask one server.

    Returns:
        {"responses", "finished"} of each prompt, two lists of `samples_per_prompt`, and the digest of the weights.

    Raises:
        UserError: `partial` was begun with other settings, prompts or weights; or the server fails, or is not of the
            model.
        Interrupted: after SIGTERM or SIGUSR2.
    """
    from prefopt.data.chat_template import markup
    from prefopt.data.tokenize import encode_prompt
    from prefopt.generation import sampler as sampler_module
    from prefopt.utils.locks import locked_by_main

    signals.install_handlers()
    if sampler is None:
        with open_sampler(request.model, request.backend, request.device, request.precision) as sampler:
            return generate_resumable(request, partial, show, sampler)
    sampling, n, prompts = request.sampling, request.samples_per_prompt, request.prompts
    pattern = markup(sampler.tokenizer)
    if doubled := sum(any(pattern.search(m.get("content") or "") for m in prompt) for prompt in prompts):
        log.warning(
            f"{doubled} of {len(prompts)} prompts hold special tokens or other markup of the chat template, which is "
            "written around them once more"
        )

    encoded = [encode_prompt(sampler.tokenizer, prompt) for prompt in prompts]
    versions = [importlib.metadata.version(package) for package in GENERATION_PACKAGES]
    where = [request.backend, request.precision, request.device]
    decides = [sampling, n, request.seed, *where, *sampler.identity, encoded, versions]
    digest = fingerprint(decides, sampler_module)

    with contextlib.ExitStack() as stack:
        if partial.is_dir():
            partial = partial / f"{digest[:24]}.jsonl"
            stack.enter_context(locked_by_main(partial.with_suffix(".lock"), "responses"))
        file = PartialFile(partial, digest)
        if file.rows:
            log.info(f"  going on after {len(file.rows)} of {len(prompts)} prompts ({partial})")

        sample_missing(request, sampler.draw, encoded, file, show)
        return [file.rows[i] for i in range(len(prompts))], sampler.weights


def sample_missing(
    request: GenerationRequest, draw: Draw, encoded: Sequence[list[int]], file: PartialFile, show: bool
) -> None:
    """Draw the responses that `file` lacks, and append them as they come. `encoded` are the token ids of the prompts.
    Raises Interrupted after SIGTERM or SIGUSR2."""
    total = len(request.prompts)
    drawn = draw(request, encoded, file.rows)
    with contextlib.closing(drawn), Bar("sampling", total, show, done=len(file.rows)) as bar:
        while len(file.rows) < total:
            if signals.stop_requested():
                raise Interrupted(f"{len(file.rows)} of {total} prompts have their responses")
            if rows := next(drawn):
                file.append(rows)
                bar.advance(by=len(rows))


def draw_batches(
    sampler: "Sampler", request: GenerationRequest, encoded: Sequence[list[int]], known: Mapping[int, Row]
) -> Generator[dict[int, Row]]:
    """`Draw` by a sampler of whole batches, which the processes share."""
    prompts, n = request.prompts, request.samples_per_prompt
    # Prompts of similar length share a batch, which saves padding. The batches are those of all prompts, whatever is
    # known already, so that a resumed call makes the same batches as an uninterrupted one.
    order = sorted(range(len(prompts)), key=lambda i: len(encoded[i]))
    size = max(1, request.sampling.batch_size // n)
    batches = [order[i : i + size] for i in range(0, len(order), size)]

    def draw(batch: list[int]) -> dict[int, Row]:
        # A batch of which a part is known is sampled whole: the numbers may depend on what is in the batch.
        drawn = sampler([prompts[i] for i in batch], request.sampling, request.seed, n)
        return {i: _as_row(samples) for i, samples in zip(batch, drawn, strict=True) if i not in known}

    missing = [batch for batch in batches if any(i not in known for i in batch)]
    for start in range(0, len(missing), world_size()):  # a batch for each process
        yield {
            i: row for rows in map_shared(draw, missing[start : start + world_size()], len) for i, row in rows.items()
        }


def _as_row(samples: "Sequence[Sample]") -> Row:
    return {"responses": [s.text for s in samples], "finished": [s.finished for s in samples]}
