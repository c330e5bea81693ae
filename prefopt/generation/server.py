"""Responses from an OpenAI-compatible server that has loaded the model, such as `vllm serve`.

Prompts are sent as token ids to `/v1/completions`, one response a request, each with a seed of its own. A server that
gives the ids of its tokens (vLLM's `return_token_ids`) is read by these, another one by its text.
"""

import contextlib
import gc
import itertools
import json
import logging
import math
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import openai
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from prefopt.config.schema import ModelConfig, SamplingConfig
from prefopt.data.sources import Row
from prefopt.errors import UserError
from prefopt.generation import guard
from prefopt.generation.responses import GenerationRequest
from prefopt.generation.sampler import as_sample, response_seed
from prefopt.models.fingerprint import files_of, loaded_model
from prefopt.models.frozen import freeze
from prefopt.models.generation_config import stop_tokens, without_own_generation_config
from prefopt.models.load import checkpoint_path, load_model, weights_digest
from prefopt.models.logprobs import autocast, vocabulary_logps
from prefopt.utils import signals
from prefopt.utils.distributed import broadcast, is_main_process
from prefopt.utils.plain import printable

log = logging.getLogger(__name__)

CHECKED_PROMPTS, CHECKED_TOKENS = 4, 8  # the server is compared with the model at so many places
# The mean of |difference| of log-probs, in nats, that rounding explains. Kernels differ, above all in bfloat16.
TOLERANCE = {"float32": 0.01, "bfloat16": 0.1}
END_S = 10.0  # a server that is asked to end has so long
POLL_S = 0.5
# Of the processes that train here, or of this environment; they would mislead a server.
NOT_ITS_OWN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "PYTHONPATH", "PYTHONHOME")


@dataclass(frozen=True)
class Place:
    """What comes behind the token ids `prompt`: `logps`, (vocabulary,) float32, the log-prob of each token."""

    prompt: list[int]
    logps: Tensor


class ModelServer:
    """A server for a model. It is started, and compared with the model, when the first response is drawn; a context
    manager ends it. Of several processes the main one starts and asks it.

    `weights` is the digest of the weights, and `identity` all of the model that decides a response.
    """

    def __init__(self, config: ModelConfig, tokenizer: PreTrainedTokenizerBase, precision: str):
        """Load the model on the CPU, in the main process."""
        self.config, self.tokenizer, self.precision = config, tokenizer, precision
        gc.collect()
        if torch.cuda.is_initialized():
            torch.cuda.empty_cache()  # of an earlier stage's training: the server takes the memory

        self.model: PreTrainedModel | None = None
        facts: Any = None
        if is_main_process():
            self.model = load_model(config, "cpu")
            stops = stop_tokens(tokenizer, self.model.config, self.model.generation_config)
            facts = weights_digest(self.model), loaded_model(self.model), stops
        self.weights, parts, self.stops = broadcast(facts)
        self.identity = [*parts, self.stops]
        self.process: subprocess.Popen[bytes] | None = None
        self.stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stack.close()

    def draw(
        self, request: GenerationRequest, encoded: Sequence[list[int]], known: Mapping[int, Row]
    ) -> Generator[dict[int, Row]]:
        """The rows of the prompts that are not in `known`, as they come; {} where none has come in a while. A
        collective. Raises UserError where the server does not start, is not of this model, or fails."""
        with contextlib.closing(self._draw(request, encoded, known)) as found:
            while True:
                yield broadcast(next(found) if is_main_process() else {})

    def _draw(
        self, request: GenerationRequest, encoded: Sequence[list[int]], known: Mapping[int, Row]
    ) -> Generator[dict[int, Row]]:
        if self.model is not None:
            assert request.server is not None
            assert request.server_log is not None
            self.server, self.log_file = request.server, request.server_log
            for _ in self._start(encoded):
                yield {}
        sampling, n = request.sampling, request.samples_per_prompt
        distinct = n if sampling.temperature else 1
        missing = [i for i in sorted(range(len(encoded)), key=lambda i: len(encoded[i])) if i not in known]
        jobs = itertools.product(missing, range(distinct))
        parts: dict[int, dict[int, tuple[str, bool]]] = {}
        pending: dict[Future[tuple[str, bool]], tuple[int, int]] = {}
        pool = ThreadPoolExecutor(sampling.batch_size)
        try:
            while True:
                for i, k in itertools.islice(jobs, sampling.batch_size - len(pending)):
                    seed = response_seed(request.seed, encoded[i], k) % 2**31
                    pending[pool.submit(self.ask, encoded[i], sampling, seed)] = i, k
                rows = {}
                for future in wait(pending, POLL_S, FIRST_COMPLETED).done:
                    i, k = pending.pop(future)
                    try:
                        parts.setdefault(i, {})[k] = future.result()
                    except UserError:
                        if signals.stop_flag.is_set:  # a server may be asked to leave together with the job
                            continue
                        raise
                    if len(parts[i]) == distinct:
                        texts, finished = zip(*(parts[i][k] for k in range(distinct)), strict=True)
                        rows[i] = {"responses": [*texts] * (n // distinct), "finished": [*finished] * (n // distinct)}
                        del parts[i]
                yield rows
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def _start(self, encoded: Sequence[list[int]]) -> Iterator[None]:
        """Start the server, wait until it answers, and compare it with the model. Yields while it waits."""
        assert self.model is not None
        model, self.model = self.model, None
        folder = self._folder(model) if self.server.command else ""
        places = next_tokens(freeze(model, self.precision), spread(encoded), self.precision)
        del model  # its memory is the server's

        values = {"model": folder, "port": str(free_port()), "precision": self.precision}
        self.url = fill(self.server.url, values)
        if self.server.command:
            self._launch([fill(word, values) for word in shlex.split(self.server.command)])
        http = openai.DefaultHttpxClient(
            follow_redirects=False, timeout=self.server.timeout, trust_env=self.url.startswith("https:")
        )
        self.client = openai.OpenAI(
            api_key="none", base_url=self.url, http_client=http, timeout=self.server.timeout, max_retries=2
        )
        self.stack.callback(self.client.close)

        patient = self.client.with_options(timeout=min(5.0, self.server.timeout), max_retries=0)
        end, why = time.monotonic() + self.server.timeout, "it was not asked"
        while True:
            try:
                self.name = str(patient.models.list().data[0].id)
                break
            except Exception as error:  # the client raises what its HTTP and JSON libraries do, besides its own
                why = str(error.__cause__ or error) or type(error).__name__
            if self.process and self.process.poll() is not None:
                raise self._ended()
            if time.monotonic() > end:
                raise UserError(
                    f"the server at {self.url} was not ready within server.timeout={self.server.timeout:g} seconds "
                    f"({why}).{self._last_lines()} Mend server.command, or give it more time."
                )
            yield
            time.sleep(POLL_S)
        self._check(places)

    def _folder(self, model: PreTrainedModel) -> str:
        """A folder with the model for the server; a temporary one where the model is more than what is at its path."""
        if not self.config.adapter and not self.config.resize_embeddings:
            return str(files_of(checkpoint_path(self.config), self.config.revision).absolute())
        folder = self.stack.enter_context(tempfile.TemporaryDirectory(prefix="prefopt-served-"))
        model.save_pretrained(folder)
        self.tokenizer.save_pretrained(folder)
        return folder

    def _launch(self, command: list[str]) -> None:
        log.info(f"  starting {shlex.join(command)} (its log: {self.log_file})")
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("ab") as file:
            file.write(f"$ {shlex.join(command)}\n".encode())
            file.flush()
            self.process = subprocess.Popen(
                [sys.executable, "-I", guard.__file__, str(END_S), *command],
                stdin=subprocess.PIPE,
                stdout=file,
                stderr=subprocess.STDOUT,
                env={name: value for name, value in os.environ.items() if name not in NOT_ITS_OWN},
                start_new_session=True,  # a Ctrl-C is for this process, which then ends the server
            )
        self.stack.callback(self._end)

    def _end(self) -> None:
        assert self.process is not None
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()

    def _check(self, places: Sequence[Place]) -> None:
        """Raise UserError unless the server's log-probs are the model's at these places."""
        with ThreadPoolExecutor(len(places)) as pool:
            differences = list(pool.map(self._difference, places))
        mean = sum(differences) / len(differences)
        found = f"log-probs at {len(places)} places differ by {mean:.2g} on average, {max(differences):.2g} at most"
        if not mean <= TOLERANCE[self.precision]:
            raise UserError(
                f"the server at {self.url} has not loaded the model {self.config.place} (it calls its own "
                f"{self.name!r}): {found}, where rounding in {self.precision} explains {TOLERANCE[self.precision]:g}. "
                "Let server.command load {model} in {precision}, without quantization."
            )
        log.info(f"  the server at {self.url} is of this model: {found}")

    def _difference(self, place: Place) -> float:
        """|log-prob of the most likely next token at the server - the same token's in the model|, in nats."""
        settings = {"max_tokens": 1, "temperature": 0.0, "logprobs": 1}
        choice = self._complete(place.prompt, settings)
        sent = getattr(choice, "prompt_token_ids", None)
        if sent not in (None, place.prompt):
            raise UserError(
                f"the server at {self.url} reads other token ids than it was sent: it takes no list of ids."
            )
        try:
            value = float(choice.logprobs.token_logprobs[0])
        except (AttributeError, IndexError, TypeError, ValueError):
            raise UserError(
                f"the server at {self.url} gives no log-probs (logprobs=1 of /v1/completions), so nothing shows that "
                "it has loaded this model. Take one that does, such as vLLM's."
            ) from None
        ids = self._token_ids(choice)
        expected = place.logps[ids[0]] if ids else place.logps.max()
        difference = abs(value - float(expected))
        return difference if math.isfinite(difference) else math.inf

    def ask(self, prompt: list[int], sampling: SamplingConfig, seed: int) -> tuple[str, bool]:
        """(a response's text without special tokens, whether it ended before the limit). Raises UserError where the
        server fails, refuses, or answers with something else."""
        settings = {
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": seed,
        }
        choice = self._complete(prompt, settings, stop_token_ids=self.stops)
        finished = choice.finish_reason == "stop"
        ids = self._token_ids(choice)
        if ids is None:
            return choice.text, finished
        sample = as_sample(self.tokenizer, prompt, ids, self.stops)
        return sample.text, sample.finished or finished  # some leave the stop token out

    def _complete(self, prompt: list[int], settings: dict[str, Any], **further: Any) -> Any:
        """The one choice of the answer. `further` are keys of vLLM's, which other servers ignore."""
        body = {"return_token_ids": True, **further}
        try:
            answer = self.client.completions.create(model=self.name, prompt=prompt, extra_body=body, **settings)
            (choice,) = answer.choices
            if not isinstance(choice.text, str) or choice.finish_reason not in ("stop", "length"):
                raise TypeError("no text, or a finish_reason other than stop and length")
        except openai.APIStatusError as error:
            raise UserError(
                f"the server at {self.url} does not answer a prompt of {len(prompt)} tokens: {printable(str(error))}"
                f"{self._last_lines()}"
            ) from None
        except openai.APIConnectionError as error:
            raise self._unreachable(error) from None
        except (openai.OpenAIError, json.JSONDecodeError, AttributeError, TypeError, ValueError) as error:
            raise self._garbage(error) from None
        return choice

    def _token_ids(self, choice: Any) -> list[int] | None:
        ids = getattr(choice, "token_ids", None)
        if ids is None:
            return None
        if not isinstance(ids, list) or not ids or not all(type(i) is int and i >= 0 for i in ids):
            raise self._garbage(f"its token_ids are {str(ids)[:80]}")
        return ids

    def _garbage(self, why: object) -> UserError:
        return UserError(
            f"the server at {self.url} does not answer as OpenAI's /v1/completions does ({printable(str(why))[:200]})."
        )

    def _unreachable(self, error: Exception) -> UserError:
        """What became of the server, from which no answer came."""
        if self.process:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(2 * POLL_S)
                return self._ended()
        reason = printable(str(error.__cause__ or error))
        return UserError(
            f"the server at {self.url} gives no answer ({reason}; server.timeout={self.server.timeout:g})."
            f"{self._last_lines()} The same command goes on where this one stopped."
        )

    def _ended(self) -> UserError:
        assert self.process is not None
        return UserError(
            f"the server ended with exit code {self.process.returncode}.{self._last_lines()} The same command goes on "
            "where this one stopped."
        )

    def _last_lines(self) -> str:
        """The end of the server's log, for a message."""
        if self.process is None or not self.log_file.is_file():
            return ""
        lines = self.log_file.read_bytes()[-4000:].decode(errors="replace").splitlines()[-8:]
        return "\n".join(["", f"The end of {self.log_file}:", *(f"  {printable(line)[:200]}" for line in lines), ""])


def spread(encoded: Sequence[list[int]]) -> list[list[int]]:
    """The prompts that are checked: different ones, from the shortest on, up to three quarters of the longest."""
    ordered = sorted({tuple(ids): ids for ids in encoded}.values(), key=len)
    return [ordered[i] for i in sorted({len(ordered) * k // CHECKED_PROMPTS for k in range(CHECKED_PROMPTS)})]


@torch.no_grad()
def next_tokens(model: PreTrainedModel, prompts: Sequence[list[int]], precision: str) -> list[Place]:
    """Behind each prompt the places of the model's own CHECKED_TOKENS most likely tokens, the first one included."""
    places = []
    settings = GenerationConfig(
        max_new_tokens=CHECKED_TOKENS,
        do_sample=False,
        pad_token_id=0,
        output_logits=True,
        return_dict_in_generate=True,
    )
    for ids in prompts:
        prompt = torch.tensor([ids], device=model.device)
        with without_own_generation_config(model), autocast(model.device, precision):
            output = model.generate(  # type: ignore[operator]  # mypy takes the mixin for a submodule
                input_ids=prompt, attention_mask=torch.ones_like(prompt), generation_config=settings
            )
        tokens = output.sequences[0].tolist()
        places += [Place(tokens[: len(ids) + k], vocabulary_logps(logits[0])) for k, logits in enumerate(output.logits)]
    return places


def fill(text: str, values: Mapping[str, str]) -> str:
    """`text` with the values of {model}, {port} and {precision}. Other braces stay: arguments may be JSON."""
    for name, value in values.items():
        text = text.replace(f"{{{name}}}", value)
    return text


def free_port() -> int:
    """A port on which nothing listens."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])
