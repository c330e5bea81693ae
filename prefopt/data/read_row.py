"""A row of a source -> what its format makes of it: fields renamed, rewards scaled, what it lacks said."""

from dataclasses import replace
from typing import Any

from prefopt.config.schema import DatasetConfig
from prefopt.data.fields import is_absent, nested
from prefopt.data.formats import Format
from prefopt.data.items import Item, Pair, Row, RowDefect
from prefopt.errors import UserError


def read_row(read: Format, row: Row, source: DatasetConfig, where: str) -> Any:
    """What the format makes of a row. Raises UserError for a row that it cannot read."""
    try:
        renamed = _renamed(row, source.columns)
        _check_nothing_is_lost(row, source)
        return read(renamed)
    except KeyError as error:
        fields = ", ".join(row) or "none"
        raise UserError(
            f"{where} has no field {error} (its fields: {fields}). {type(read).__name__} rows are: "
            f"{(type(read).__doc__ or '').splitlines()[0]} Other names are mapped by dataset.columns."
        ) from None
    except RowDefect as error:
        return error.dropped
    except ValueError as error:
        raise UserError(f"{where}: {error}. Mend the row, or leave it out.") from None


def _check_nothing_is_lost(row: Row, source: DatasetConfig) -> None:
    """Raise ValueError where `columns` makes a prompt of one half of Alpaca's question."""
    halves = {"instruction": "input", "input": "instruction"}
    other = halves.get(source.columns.get("prompt", ""))
    if other in row and not is_absent(row[other]):
        raise ValueError(
            f"dataset.columns.prompt={halves[other]} would leave out {other!r}, which is not empty. Rows with "
            "instruction and input are read as they are; leave out dataset.columns.prompt: "
            f"python -m prefopt.train dataset={source.train}"
        )


def _renamed(row: Row, columns: dict[str, str]) -> Row:
    """The row with the fields of `columns` ({our name: theirs}) added under our names. Their name may lead into a
    nested object ("metadata.score"). Raises KeyError for a field that is missing."""
    return row | {ours: row[theirs] if theirs in row else nested(row, theirs) for ours, theirs in columns.items()}


def scaled(item: Item, source: DatasetConfig, where: str) -> Item:
    """The item with its rewards mapped from the source's `reward_scale` to [0, 1]. Raises UserError for a reward
    outside of the scale."""
    if not isinstance(item, Pair) or source.reward_scale is None:
        return item
    low, high = source.reward_scale
    rewards: dict[str, Any] = {}
    for side in ("chosen_reward", "rejected_reward"):
        value = getattr(item, side)
        if value is not None and not low <= value <= high:
            raise UserError(f"{where}: {side} {value:g} is outside dataset.reward_scale={source.reward_scale}.")
        rewards[side] = None if value is None else (value - low) / (high - low)
    others = item.others and [replace(other, reward=(other.reward - low) / (high - low)) for other in item.others]
    return replace(item, **rewards, others=others)
