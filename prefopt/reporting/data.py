"""The tables of a data report: counts, lengths, rewards, overlaps, examples."""

import csv
import io
import itertools
import math
import re
import shlex
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from prefopt.config.parse import build
from prefopt.data.cache import Limits, Prepared, TokenizedPairs, format_made
from prefopt.data.dataset import load_split, prompt_of, sources
from prefopt.data.fields import as_messages
from prefopt.data.formats import Format
from prefopt.data.items import Message
from prefopt.data.sources import read_rows
from prefopt.errors import UserError
from prefopt.reporting.config import DataReportConfig
from prefopt.reporting.style import COLORS, COLUMN, PAGE, plotting, save
from prefopt.reporting.tables import MISSING, Column, markdown_table
from prefopt.utils.console import console
from prefopt.utils.files import resolve_path
from prefopt.utils.plain import csv_cell, markdown_text

UNLIMITED = Limits(sys.maxsize, sys.maxsize)
BARS = 30  # of a histogram, at most about so many
Lengths = dict[str, np.ndarray]
Splits = dict[str, Prepared]


@dataclass(frozen=True)
class Section:
    """One table. The first `labels` columns say what a row is about. Columns whose name begins with "share" hold
    fractions of 1 and are shown in percent."""

    title: str
    labels: int
    columns: tuple[str, ...]
    rows: list[tuple[Any, ...]]
    notes: list[str] = field(default_factory=list)

    def cells(self) -> list[list[str]]:
        return [[_cell(c, v) for c, v in zip(self.columns, row, strict=True)] for row in self.rows]


def arrow(split: Prepared) -> pa.Table:
    """The columns of a split (`prefopt.data.cache.SCHEMA`), memory-mapped."""
    assert isinstance(split.pairs, TokenizedPairs)
    return split.pairs.table


def token_counts(table: pa.Table, column: str) -> np.ndarray:
    """(rows,) numbers of token ids in a column of lists."""
    return pc.list_value_length(table[column]).to_numpy().astype(np.int64)


def learnt_counts(table: pa.Table) -> np.ndarray:
    """(rows,) numbers of tokens of each chat that the assistant wrote."""
    chunks = table["loss_mask"].chunks
    return np.concatenate(
        [np.bincount(pc.list_parent_indices(c).filter(pc.list_flatten(c)), minlength=len(c)) for c in chunks]
    )


def lengths(split: Prepared) -> Lengths:
    """(rows,) tokens of what a row consists of: prompt, chosen and rejected, or prompt, whole chat and learnt."""
    table = arrow(split)
    prompt, chosen = token_counts(table, "prompt"), token_counts(table, "chosen")
    if split.counts["kind"] == "chats":
        return {"prompt": prompt, "whole chat": prompt + chosen, "learnt": learnt_counts(table)}
    return {"prompt": prompt, "chosen": chosen, "rejected": token_counts(table, "rejected")}


def reward_gaps(split: Prepared) -> np.ndarray:
    """(rows with both rewards,) chosen minus rejected reward."""
    table = arrow(split)
    gaps = table["chosen_reward"].to_numpy() - table["rejected_reward"].to_numpy()
    return gaps[np.isfinite(gaps)]


def length_limits(config: DataReportConfig) -> dict[str, int]:
    """The most tokens of each part; what is learnt of a chat has no limit."""
    prompt, completion = config.max_prompt_tokens, config.max_completion_tokens
    return {"prompt": prompt, "chosen": completion, "rejected": completion, "whole chat": prompt + completion}


def policies_of(config: DataReportConfig) -> dict[str, str]:
    """The policy of each defect; of a mixture, those of its sources."""
    policies = [asdict(source.policies) for source in sources(config.dataset).values()]
    return {defect: " / ".join(sorted({p[defect] for p in policies})) for defect in policies[0]}


def layout_section(config: DataReportConfig) -> Section:
    """How the rows of each source are read."""
    rows = []
    for name, source in sources(config.dataset).items():
        read = build(source.format, Format, "dataset.format")
        columns = ", ".join(f"{ours} = {theirs}" for ours, theirs in source.columns.items())
        rows.append((name, type(read).__name__, (type(read).__doc__ or "").splitlines()[0], columns or MISSING))
    return Section("Layout of the rows", 4, ("source", "format", "rows", "columns"), rows)


def training_command(overrides: Sequence[str], kind: str) -> str:
    """The command that trains on what a report with these overrides has read. `kind`: pairs, groups or chats."""
    of_the_report = ("output", "evaluation_prompts", "hydra")
    kept = [o for o in overrides if o.lstrip("+~").partition("=")[0].partition(".")[0] not in of_the_report]
    objective = {"chats": ["objective=sft"], "groups": ["objective=grpo"]}.get(kind, [])
    return shlex.join(["python", "-m", "prefopt.train", *objective, *kept])


def count_sections(config: DataReportConfig, splits: Splits) -> list[Section]:
    """Items by split and source, and defects by reason."""
    kind = next(iter(splits.values())).counts["kind"]
    rows: list[tuple[Any, ...]] = []
    for name, split in splits.items():
        rows += [(name, source, n) for source, n in split.counts["sources"].items()]
        rows.append((name, "all, within the length limits", split.counts["items"]))
    counted = {name: split.counts["dropped"] | split.counts["kept"] for name, split in splits.items()}
    policy = policies_of(config)
    made = format_made(config.dataset, splits["heldout"].counts) if "heldout" in splits else ""
    reasons = dict.fromkeys([*policy, *(reason for counts in counted.values() for reason in counts)])
    defects = [(r, policy.get(r, "keep"), *(counts.get(r, 0) for counts in counted.values())) for r in reasons]
    return [
        Section("Counts", 2, ("split", "source", kind), rows, [made] if made else []),
        Section("Defects, and what is done about them", 2, ("defect", "policy", *splits), defects),
    ]


def length_sections(config: DataReportConfig, splits: Splits, trained: Splits) -> list[Section]:
    """Statistics of the lengths of `splits`, and of pairs how their two sides compare; `trained` is within the
    limits."""
    limits, rows, compared = length_limits(config), [], []
    for name, split in splits.items():
        parts = lengths(split)
        for part, n in parts.items():
            median, p90 = np.quantile(n, [0.5, 0.9]).tolist()
            over = float(np.mean(n > limits[part])) if part in limits else None
            rows.append((name, part, median, p90, int(n.max()), limits.get(part), over))
        if split.counts["kind"] == "pairs":
            longer = parts["chosen"] - parts["rejected"]
            sums = {part: int(n.sum()) for part, n in lengths(trained[name]).items()}
            saved = sums["prompt"] / (2 * sums["prompt"] + sums["chosen"] + sums["rejected"])
            shares = float(np.mean(longer > 0)), float(np.mean(longer == 0))
            compared.append((name, *shares, float(longer.mean()), saved))
    columns = "split", "part", "median", "p90", "max", "limit", "share over the limit"
    sections = [Section("Lengths in tokens", 2, columns, rows, ["Before anything is cut or dropped for its length."])]
    if compared:
        columns_of_pairs = "split", "share chosen longer", "share equally long", "mean difference", "share saved"
        notes = [
            "Mean difference: chosen − rejected, in tokens. Saved: the tokens that are computed once where the two "
            "sides share a prompt, prompt / (2·prompt + chosen + rejected), within the limits."
        ]
        sections.append(Section("The two sides of a pair", 1, columns_of_pairs, compared, notes))
    return sections


def reward_section(splits: Splits) -> list[Section]:
    """Quantiles of the reward gap, where there are rewards."""
    rows: list[tuple[Any, ...]] = []
    for name, split in splits.items():
        gaps = reward_gaps(split)
        if len(gaps):
            quantiles = np.quantile(gaps, [0, 0.1, 0.5, 0.9, 1]).tolist()
            rows.append((name, len(gaps), *quantiles, float(np.mean(gaps == 0)), float(np.mean(gaps < 0))))
    columns = ("split", "pairs", "min", "p10", "median", "p90", "max", "share tied", "share chosen is worse")
    return [Section("Reward gap: chosen − rejected", 1, columns, rows)] if rows else []


def prompt_key(prompt: Iterable[Message]) -> str:
    """The turns of a prompt with every stretch of whitespace made one blank; a system message is left out."""
    return "\n".join(" ".join(m["content"].split()) for m in prompt if m["role"] != "system")


def evaluation_keys(path: str) -> list[str]:
    """The prompts of an evaluation file, all its rows, or of the split "train" of a folder or hub data set.

    Raises UserError for a row without a usable `prompt` or `instruction`.
    """
    keys = []
    for where, row in read_rows(path, None if resolve_path(path).is_file() else "train"):
        name = next((name for name in ("prompt", "instruction") if name in row), None)
        if name is None:
            raise UserError(f"{where} has no field 'prompt' or 'instruction' (its fields: {', '.join(row) or 'none'}).")
        try:
            keys.append(prompt_key(as_messages(row[name])))
        except ValueError as error:
            raise UserError(f"{where}: {error}.") from None
    return keys


def overlap_section(config: DataReportConfig, splits: Splits, evaluation: dict[str, list[str]]) -> list[Section]:
    """Prompts that the splits have in common with each other and with evaluation files, before any is dropped for
    it."""
    keys = {name: [prompt_key(prompt_of(item)) for item in load_split(config.dataset, name)] for name in splits}
    others = {name: keys[name] for name in keys if name != "train"} | evaluation
    rows: list[tuple[Any, ...]] = []
    notes = ["Prompts are compared without system message, all whitespace made one blank; nothing is dropped before."]
    for name, other in itertools.product(keys, others):
        if name == other:
            continue
        known = set(others[other])
        hits = [key for key in keys[name] if key in known]
        rows.append((name, other, len(known), len(hits), len(hits) / len(keys[name])))
        examples = "; ".join(f"“{shortened(key, 80)}”" for key in list(dict.fromkeys(hits))[:3])
        if hits:
            notes.append(f"In {name} and {other}: {examples}")
    if len(splits) > 1:
        counts = splits["train"].counts["dropped"] | splits["train"].counts["kept"]
        policy = policies_of(config)["prompt_in_heldout"]
        notes.insert(1, f"prompt_in_heldout (policy {policy}) counted {counts.get('prompt_in_heldout', 0)} of train.")
    columns = ("prompts of", "compared with", "its prompts", "rows in both", "share of rows")
    return [Section("Overlap of prompts", 2, columns, rows, notes)] if rows else []


def marked(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], learnt: Sequence[bool]) -> str:
    """The text of (tokens,) ids with special tokens; what is learnt is enclosed in ⟦ ⟧, long stretches lose their
    middle."""
    text = ""
    for is_learnt, run in itertools.groupby(zip(ids, learnt, strict=True), key=lambda pair: pair[1]):
        decoded = tokenizer.decode([i for i, _ in run], clean_up_tokenization_spaces=False)
        part = shortened(str(decoded), 800)
        text += f"⟦{part}⟧" if is_learnt else part
    return text


def examples(tokenizer: PreTrainedTokenizerBase, split: Prepared) -> str:
    """The first, the middle and the last row of a split in Markdown, as the loss sees them."""
    blocks = []
    for index in sorted({0, len(split.pairs) // 2, len(split.pairs) - 1}):
        item = split.pairs[index]
        chosen = marked(tokenizer, item.prompt + item.chosen, [False] * len(item.prompt) + item.mask)
        blocks.append(
            f"Row {index + 1}, {markdown_text(item.id)}, {len(item.prompt)} + {len(item.chosen)} tokens"
            f"{_reward(item.chosen_reward)}:\n\n{fenced(chosen)}"
        )
        if item.rejected:
            rejected = marked(tokenizer, item.rejected, [True] * len(item.rejected))
            blocks.append(
                f"Rejected, after the same prompt, {len(item.rejected)} tokens{_reward(item.rejected_reward)}:\n\n"
                f"{fenced(rejected)}"
            )
    return "\n\n".join(blocks)


def shortened(text: str, most: int) -> str:
    """`text` without its middle if it has more than `most` characters."""
    return text if len(text) <= most else f"{text[: most // 2]} […] {text[-(most // 2) :]}"


def fenced(text: str) -> str:
    """A Markdown block that no backticks in the text can end."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}text\n{text}\n{fence}"


def markdown(section: Section) -> str:
    """The section with its heading, its table and its notes."""
    columns = [Column(name, name, text=i < section.labels) for i, name in enumerate(section.columns)]
    notes = map(markdown_text, section.notes)
    return "\n\n".join([f"## {markdown_text(section.title)}", markdown_table(columns, section.cells()), *notes])


def long_csv(sections: list[Section]) -> str:
    """Every number with full precision: table, row, column, value."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(("table", "row", "column", "value"))
    for section in sections:
        for row in section.rows:
            label = " / ".join(row[: section.labels])
            for column, value in zip(section.columns[section.labels :], row[section.labels :], strict=True):
                writer.writerow(map(csv_cell, (section.title, label, column, value)))
    return stream.getvalue()


def show(section: Section) -> None:
    """Print the section."""
    table = Table(title=section.title, title_justify="left")
    for i, column in enumerate(section.columns):
        table.add_column(column, overflow="fold", justify="left" if i < section.labels else "right")
    for row in section.cells():
        table.add_row(*map(Text, row))
    terminal = console()
    terminal.print(table)
    for note in section.notes:
        terminal.print(Text(note))
    terminal.print()


def draw(config: DataReportConfig, splits: Splits, output: Path) -> list[Path]:
    """Histograms of the lengths, a row of panels per split, and of the reward gaps where there are rewards."""
    kind, limits = next(iter(splits.values())).counts["kind"], length_limits(config)
    files: list[Path] = []

    def histogram(axis: Any, values: np.ndarray, edges: np.ndarray, color: str, label: str) -> None:
        shares = np.full(len(values), 1 / len(values))
        look = {"histtype": "stepfilled", "edgecolor": color, "facecolor": (color, 0.3), "linewidth": 1.2}
        axis.hist(np.clip(values, edges[0], edges[-1]), edges, weights=shares, label=label, **look)

    with plotting() as plt:
        size = (PAGE, 2.6 * len(splits) + 0.3)
        figure, axes = plt.subplots(len(splits), 2, figsize=size, squeeze=False, sharex="col", layout="constrained")
        measured = {name: lengths(split) for name, split in splits.items()}
        parts = list(measured["train"])
        for column, members in enumerate((parts[:1], parts[1:])):
            values = np.concatenate([measured[name][part] for name in splits for part in members])
            edges = bin_edges(values[values <= np.quantile(values, 0.99)])
            for axis, name in zip(axes[:, column], splits, strict=True):
                for part in members:
                    histogram(axis, measured[name][part], edges, COLORS[parts.index(part)], part)
                limit = limits[members[0]]
                if limit < edges[-1]:
                    axis.axvline(limit, color="0.4", linestyle="--", linewidth=1, label=f"limit {limit}")
                axis.set_title(f"{config.dataset.name}, {name}", fontsize=8)
                axis.set_ylabel(f"share of {kind}")
                axis.legend(frameon=False, fontsize=8)
            longest = " (last bar: and longer)" if values.max() > edges[-1] else ""
            axes[-1, column].set_xlabel(f"tokens{longest}")
        files += save(figure, output, "lengths")

        gaps = {name: gaps for name, split in splits.items() if len(gaps := reward_gaps(split))}
        if gaps:
            size = (PAGE if len(gaps) > 1 else COLUMN, 2.6)
            figure, axes = plt.subplots(1, len(gaps), figsize=size, squeeze=False, sharex=True, layout="constrained")
            edges = bin_edges(np.concatenate(list(gaps.values())))
            for axis, (name, values) in zip(axes[0], gaps.items(), strict=True):
                histogram(axis, values, edges, COLORS[0], "")
                median = float(np.median(values))
                axis.axvline(median, color="0.4", linestyle="--", linewidth=1, label=f"median {median:.3g}")
                axis.set_title(f"{config.dataset.name}, {name}", fontsize=8)
                axis.set_xlabel("reward gap: chosen − rejected")
                axis.set_ylabel("share of pairs")
                axis.legend(frameon=False, fontsize=8)
            files += save(figure, output, "reward_gaps")
    return files


def bin_edges(values: np.ndarray) -> np.ndarray:
    """Edges of about BARS bars or fewer. Their width is a multiple of the least difference of two values, so that
    whole numbers (or grades) fill the bars evenly."""
    distinct = np.unique(np.round(values, 6))
    least = float(np.diff(distinct).min()) if len(distinct) > 1 else 1.0
    width = least * max(1, math.ceil((distinct[-1] - distinct[0]) / BARS / least))
    start = float(distinct[0]) - least / 2
    return start + width * np.arange(math.floor((distinct[-1] - start) / width) + 2)


def _reward(reward: float | None) -> str:
    return "" if reward is None else f", reward {reward:.4g}"


def _cell(column: str, value: Any) -> str:
    if value is None:
        return MISSING
    if isinstance(value, float):
        return f"{100 * value:.1f} %" if column.startswith("share") else f"{value:.4g}"
    return str(value)
