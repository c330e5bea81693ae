"""Tokenized data on disk: memory-mapped Arrow files, made once and shared by all runs on this machine.

The key covers everything that decides the tokens: the content of the data, how rows are read, the tokenizer and its
template, the length policy, and the code that reads and tokenizes. `utils/store.py` keeps the files of a key.
"""

import itertools
import json
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import pyarrow as pa
import pyarrow.compute as pc
from transformers import PreTrainedTokenizerBase

import prefopt.data.dataset
from prefopt.config.parse import build
from prefopt.config.schema import DatasetConfig, PoliciesConfig
from prefopt.data import (
    build_items,
    chat_template,
    fields,
    folders,
    formats,
    items,
    portions,
    proof,
    read_row,
    readers,
    rendering,
)
from prefopt.data import sources as data_sources
from prefopt.data import tokenize as tokenizing
from prefopt.data.dataset import (
    Split,
    dataset_fingerprint,
    has_heldout,
    load_split,
    made_share,
    made_split,
    prompt_of,
    sources,
    split_digest,
)
from prefopt.data.formats import Format
from prefopt.data.items import Item, Message
from prefopt.data.tokenize import TokenizedPair, tokenize
from prefopt.errors import UserError
from prefopt.utils.console import Bar, log_wrapped
from prefopt.utils.files import cache_dir
from prefopt.utils.fingerprint import fingerprint
from prefopt.utils.store import opened

log = logging.getLogger(__name__)

SCHEMA = pa.schema(
    {
        "id": pa.string(),
        "prompt": pa.list_(pa.int32()),
        "chosen": pa.list_(pa.int32()),
        "rejected": pa.list_(pa.int32()),
        "chosen_reward": pa.float64(),
        "rejected_reward": pa.float64(),
        "weight": pa.float64(),
        "chosen_token_weights": pa.list_(pa.float32()),
        "rejected_token_weights": pa.list_(pa.float32()),
        "loss_mask": pa.list_(pa.bool_()),
        "source": pa.string(),
        "others": pa.list_(pa.list_(pa.int32())),
        "other_rewards": pa.list_(pa.float64()),
    }
)
CHUNK = 1000  # items tokenized at a time


class TokenizedPairs(Sequence[TokenizedPair]):
    """The rows of an Arrow file. A row is read from the memory map when it is indexed."""

    def __init__(self, file: Path):
        self.table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()

    def __len__(self) -> int:
        return len(self.table)

    def num_tokens(self, columns: Sequence[str]) -> int:
        """The number of tokens in these columns of all rows: prompt, chosen, rejected, others. A column may come
        again."""

        def lengths(column: str) -> pa.ChunkedArray:
            values = self.table[column]
            return pc.list_value_length(pc.list_flatten(values) if column == "others" else values)

        return sum(pc.sum(lengths(column)).as_py() or 0 for column in columns)

    @overload
    def __getitem__(self, index: int) -> TokenizedPair: ...
    @overload
    def __getitem__(self, index: slice) -> list[TokenizedPair]: ...
    def __getitem__(self, index: int | slice) -> TokenizedPair | list[TokenizedPair]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        (row,) = self.table.slice(index % len(self), 1).to_pylist()
        return TokenizedPair(**row)


@dataclass(frozen=True)
class Prepared:
    """One split, ready to be batched."""

    pairs: Sequence[TokenizedPair]
    prompts: list[list[Message]]  # of the held-out split, as messages; of the training split: none
    counts: dict[str, Any]  # items, kind, sources, dropped and kept, for the run's record
    rewards: dict[str, Any]  # as `Split.rewards`
    longest: int  # tokens of the longest prompt with its longer completion


@dataclass(frozen=True)
class Limits:
    """The length policy, in tokens."""

    prompt: int
    completion: int


Check = Callable[[str, dict[str, Any]], None]  # (split, rewards) -> None, or raises UserError


def prepare_dataset(
    dataset: DatasetConfig, tokenizer: PreTrainedTokenizerBase, limits: Limits, check: Check, show: bool = True
) -> dict[str, Prepared]:
    """The splits "train" and, where the data have one or it is made, "heldout"; from the cache, or read, tokenized and
    cached. None is made of rows that have one prompt.

    `check(split, rewards)` may raise UserError before the data are tokenized; `rewards` are those of `Split`. Raises
    UserError where a split has no item left.
    """
    # Held out first: training items are checked against its prompts.
    names = ["heldout", "train"] if has_heldout(dataset) else ["train"]
    folder = cache_dir() / "tokenized" / cache_key(dataset, tokenizer, limits, names)
    opened(folder, "tokenized data", lambda aside: write_splits(dataset, tokenizer, limits, names, aside, check, show))
    prepared = {}
    for name in reversed(names):
        if not (folder / f"{name}.json").is_file():
            log.info("  held out: nothing, since all rows have the same prompt")
            continue
        meta = json.loads((folder / f"{name}.json").read_text())
        check(name, meta["rewards"])
        prepared[name] = Prepared(TokenizedPairs(folder / f"{name}.arrow"), **meta)
        log.info(f"  {name}: {format_counts(meta['counts'])}")
        if made := format_made(dataset, meta["counts"]):
            log_wrapped(log, made)
    return prepared


def format_counts(counts: dict[str, Any]) -> str:
    """The counts of a split on one line."""
    parts = [f"{counts['items']} {counts['kind']}"]
    if len(counts["sources"]) > 1:
        parts[0] += f" ({', '.join(f'{name} {n}' for name, n in counts['sources'].items())})"
    parts.append(f"dropped: {', '.join(f'{reason} {n}' for reason, n in counts['dropped'].items()) or 'none'}")
    if counts["kept"]:
        parts.append(f"kept: {', '.join(f'{reason} {n}' for reason, n in counts['kept'].items())}")
    return "; ".join(parts)


def format_made(dataset: DatasetConfig, counts: dict[str, Any]) -> str:
    """How the held-out split with these counts was made; "" for one that the data name, and for the training split."""
    if "of_prompts" not in counts:
        return ""
    return (
        f"held out: {counts['prompts']} of {counts['of_prompts']} prompts ({counts['items']} {counts['kind']}), the "
        f"same for every seed, since dataset.heldout names none (dataset.heldout_share={dataset.heldout_share:g})"
    )


def tokenizer_digest(tokenizer: PreTrainedTokenizerBase) -> str:
    """A digest of what decides the tokenizer's output: vocabulary and merges, special tokens, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules: Any
    if backend is None:  # a tokenizer in Python
        added = {number: repr(token) for number, token in tokenizer.added_tokens_decoder.items()}
        rules = [sorted(tokenizer.get_vocab().items()), added]
    else:
        # Padding and truncation are left over from the tokenizer's last call, and `encode` uses neither.
        rules = json.loads(backend.to_str()) | {"padding": None, "truncation": None}
    state = [
        type(tokenizer).__name__,
        rules,
        tokenizer.chat_template,
        {name: str(token) for name, token in tokenizer.special_tokens_map.items()},
    ]
    return fingerprint(state)


def cache_key(dataset: DatasetConfig, tokenizer: PreTrainedTokenizerBase, limits: Limits, names: list[str]) -> str:
    """24 hexadecimal digits: the name of the folder of the splits `names`."""
    digests = {name: split_digest(dataset, name) for name in names}
    # A format may be the user's own class, in a file beside the data: its source counts, too.
    of_formats = [type(build(source.format, Format, "format")) for source in sources(dataset).values()]
    decides = [digests, dataset_fingerprint(dataset), tokenizer_digest(tokenizer), limits]
    reading = [prefopt.data.dataset, portions, read_row, data_sources, folders, readers, formats, fields, items]
    code = [*reading, build_items, tokenizing, rendering, proof, chat_template]
    return fingerprint(decides, *code, *of_formats)[:24]


def write_splits(
    dataset: DatasetConfig,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    names: list[str],
    folder: Path,
    check: Check,
    show: bool,
) -> None:
    """Read and tokenize the splits `names` (held out first), and write them into `folder`.

    Raises UserError where `check` does, and where a split has no item left. A made held-out split without prompts is
    left out.
    """
    splits: dict[str, Split] = {}
    policies = {name: source.policies for name, source in sources(dataset).items()}
    made = made_split(dataset) if made_share(dataset) else None
    for name in names:
        if name == "heldout" and made and not made.prompts:
            continue
        splits[name] = load_split(dataset, name, map(prompt_of, splits.get("heldout", ())))
        check(name, splits[name].rewards)

    for name, split in splits.items():
        file = folder / f"{name}.arrow"
        counts, longest = write_split(file, name, split, tokenizer, limits, policies, show)
        prompts = []
        if name == "heldout":
            kept_ids = set(TokenizedPairs(file).table["id"].to_pylist())  # tokenizing drops some items
            prompts = [prompt_of(item) for item in split if item.id in kept_ids]
            if made:
                counts |= {"prompts": len(made.prompts), "of_prompts": made.of}
        meta = {"prompts": prompts, "counts": counts, "rewards": split.rewards, "longest": longest}
        (folder / f"{name}.json").write_text(json.dumps(meta, ensure_ascii=False))


def write_split(
    file: Path,
    name: str,
    split: Split,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits,
    policies: dict[str, PoliciesConfig],
    show: bool,
) -> tuple[dict[str, Any], int]:
    """Tokenize a split chunk by chunk into `file`, so that it never lies in memory as a whole.

    Returns its counts, and the most tokens of a prompt with its longer completion. Raises UserError where no item is
    left.
    """
    dropped, kept, counted, longest = Counter(split.drops), Counter(split.kept), Counter[str](), 0
    with (
        pa.OSFile(str(file), "wb") as sink,
        pa.ipc.new_file(sink, SCHEMA) as writer,
        Bar(f"tokenizing {name}", len(split), show) as bar,
    ):
        for source, items in chunk_by_source(split):
            chunk = tokenize(tokenizer, items, limits.prompt, limits.completion, policies[source])
            writer.write_batch(pa.RecordBatch.from_pylist([vars(p) for p in chunk.pairs], schema=SCHEMA))
            dropped += chunk.dropped
            kept += chunk.noted
            counted[source] += len(chunk.pairs)
            # In the padded layout, the longest row is a prompt with its longer completion.
            completions = ((p, (p.chosen, p.rejected, *(p.others or ()))) for p in chunk.pairs)
            longest = max([longest, *(len(p.prompt) + max(map(len, texts)) for p, texts in completions)])
            bar.advance(by=len(items))

    if not counted.total():
        reasons = ", ".join(f"{reason} {k}" for reason, k in dropped.items()) or "none"
        raise UserError(
            f"nothing is left of the {name} split (dropped: {reasons}). Raise max_prompt_tokens={limits.prompt} where "
            "prompts are too long; what is done about another defect is set by dataset.policies.DEFECT."
            + (" To hold out nothing set dataset.heldout_share=0." if name == "heldout" else "")
        )
    counts = {
        "items": counted.total(),
        "kind": split.kind,
        "sources": dict(counted),
        "dropped": dict(dropped),
        "kept": dict(kept),
    }
    return counts, longest


def chunk_by_source(items: Iterable[Item]) -> Iterator[tuple[str, list[Item]]]:
    """(source, up to CHUNK of its items), in the order of `items`."""
    for source, group in itertools.groupby(items, key=lambda item: item.source):
        while chunk := list(itertools.islice(group, CHUNK)):
            yield source, chunk
