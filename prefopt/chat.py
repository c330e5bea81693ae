"""Talk with a policy in the terminal: its answers come as they are written.

    python -m prefopt.chat run=runs/RUN
    python -m prefopt.chat model=hub model.path=Qwen/Qwen2.5-0.5B-Instruct sampling.temperature=0

`/new` begins another conversation, `/exit` or Ctrl-D ends the program, and Ctrl-C ends an answer.
"""

import contextlib
import sys
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from prefopt.cli.program import program
from prefopt.config.hardware import check_hardware, resolve_hardware
from prefopt.config.parse import parse
from prefopt.errors import UserError
from prefopt.generation.config import ChatConfig
from prefopt.tracking.policies import exported_policies

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

HINT = "/new begins another conversation, /exit ends"


def typed() -> Iterator[str]:
    """The lines that are typed, up to the end of the input."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  # the arrow keys edit the line
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            yield input("> ")
    print()


def talk(
    model: "PreTrainedModel", tokenizer: "PreTrainedTokenizerBase", config: ChatConfig, lines: Iterable[str]
) -> None:
    """Answer `lines`, each after those before it, until they end or one is /exit. Answers are written to stdout."""
    from transformers import TextStreamer, set_seed

    from prefopt.data.items import Message
    from prefopt.generation.sampler import answer

    opening: list[Message] = [{"role": "system", "content": config.system}] if config.system else []
    set_seed(config.seed)
    messages = list(opening)
    for line in lines:
        match line.strip():
            case "/exit":
                return
            case "/new":
                messages = list(opening)
            case "":
                print(HINT)
            case text:
                streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
                asked: list[Message] = [*messages, {"role": "user", "content": text}]
                try:
                    said = answer(model, tokenizer, asked, config.sampling, streamer)
                except KeyboardInterrupt:
                    print("\n(not finished, and forgotten)")
                    continue
                except UserError as error:
                    print(error)
                    continue
                if not said.finished:
                    print(f"(cut off after {len(said.tokens)} tokens)")
                messages = [*asked, {"role": "assistant", "content": said.text}]


@program("chat", ChatConfig)
def main(cfg: DictConfig) -> None:
    config = parse(cfg, ChatConfig)
    check_hardware(config)
    resolve_hardware(config)
    if config.run:
        (policy,) = exported_policies(config.run, "final")
        config.model = policy.model

    from prefopt.models.frozen import freeze
    from prefopt.models.load import finalize, load_model, load_tokenizer
    from prefopt.models.logprobs import autocast

    tokenizer = load_tokenizer(config.model)
    model = finalize(freeze(load_model(config.model, "cpu"), config.precision), config.device)
    print(f"{config.model.place}: {HINT}", file=sys.stderr)
    with autocast(model.device, config.precision):
        talk(model, tokenizer, config, typed())


if __name__ == "__main__":
    main()
