"""Reading one file of rows: JSON lines, JSON, CSV, TSV, the gzips of these, Parquet, and the Arrow files of `datasets`.

All kinds give the same rows: dictionaries of what JSON can hold. In CSV and TSV every value is text, and an empty cell
is None; an empty text is written "".
"""

import codecs
import contextlib
import gzip
import io
import json
import re
import shlex
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from prefopt.errors import UserError

TEXT_KINDS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv")  # read gzipped, too
KINDS = (*TEXT_KINDS, ".parquet", ".arrow")
SUFFIXES = (*KINDS, *(f"{kind}.gz" for kind in TEXT_KINDS))
READABLE = f"{', '.join(TEXT_KINDS)}, each of these also with .gz, .parquet, .arrow"  # for messages
Row = dict[str, Any]

# A cell of a table, in quotes or not, with what ends it: the delimiter D, a line break or the end of the data. After a
# closing quote there may, wrongly, be any other byte.
CELL = rb'"([^"]*+(?:""[^"]*+)*+)"(D|\r\n?|\n|\Z|.)|([^"D\r\n][^D\r\n]*+)?(D|\r\n?|\n|\Z)'
CHUNK = 2**20  # bytes


def kind_of(name: str) -> str | None:
    """Which of KINDS a file is, by its name; None for another file."""
    return next((kind for kind in KINDS if name.removesuffix(".gz").endswith(kind) and name.endswith(SUFFIXES)), None)


def read_file(name: str, file: Path) -> Iterator[tuple[str, Row]]:
    """Yield ("NAME, row n", row) for the rows of a file. `name`, whose ending is one of SUFFIXES, stands in messages.

    Raises UserError, naming file and row, for what cannot be read. A file without rows yields none.
    """
    kind = kind_of(name)
    if kind in (".parquet", ".arrow"):
        yield from _arrow_rows(name, file)
        return
    try:
        with _text(name, file) as stream:
            if kind == ".json":
                yield from _json_rows(name, stream.read())
            elif kind in (".csv", ".tsv"):
                yield from _table_rows(name, stream, b"," if kind == ".csv" else b"\t")
            else:
                yield from _json_lines(name, stream)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"data file {name} cannot be read: {error}. Get it again, or give another file.") from None


@contextlib.contextmanager
def _text(name: str, file: Path) -> Iterator[IO[bytes]]:
    """The bytes of a text file, unzipped, after a byte order mark. Raises UserError for UTF-16 and UTF-32."""
    is_zipped = name.endswith(".gz")
    with gzip.open(file) if is_zipped else file.open("rb") as stream:
        start = stream.read(4)
        if encoding := _wide_encoding(start):
            old, new = shlex.quote(name), shlex.quote(f"utf8-{file.name.removesuffix('.gz')}")
            convert = f"iconv -f {encoding} -t UTF-8"
            raise UserError(
                f"data file {name} is in {encoding}, and must be in UTF-8. Convert it, and give the new file:\n"
                f"  {f'zcat {old} | {convert} > {new}' if is_zipped else f'{convert} {old} > {new}'}"
            )
        stream.seek(len(codecs.BOM_UTF8) if start.startswith(codecs.BOM_UTF8) else 0)
        yield stream  # type: ignore[misc]


def _wide_encoding(start: bytes) -> str | None:
    """The encoding of a text with two or four bytes a character, by its first four bytes; None for any other."""
    if start.startswith((codecs.BOM_UTF32_LE, codecs.BOM_UTF32_BE)):
        return "UTF-32"
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return "UTF-16"
    if b"\0" in start:  # without a byte order mark
        return "UTF-16BE" if start.startswith(b"\0") else "UTF-16LE"
    return None


# JSON


def _json_lines(name: str, lines: Iterable[bytes]) -> Iterator[tuple[str, Row]]:
    for n, line in enumerate(lines, start=1):
        line = line.removeprefix(codecs.BOM_UTF8)  # files that were joined have one at the beginning of each
        if line.strip():
            where = f"{name}, row {n}"
            yield where, _object(where, _parsed(where, line, "Each line must be one JSON object, in UTF-8."))


def _json_rows(name: str, data: bytes) -> Iterator[tuple[str, Row]]:
    """The rows of a list, of the one list of objects in an object, or of JSON lines in a file that is called .json."""
    try:
        value = _parsed(name, data, "It must hold a list of objects, or one object a line, in UTF-8.")
    except UserError:
        if not _is_object(data.lstrip().partition(b"\n")[0]):
            raise
        yield from _json_lines(name, io.BytesIO(data))
        return
    if isinstance(value, dict):
        lists = [v for v in value.values() if isinstance(v, list) and v and all(isinstance(row, dict) for row in v)]
        value = lists[0] if len(lists) == 1 else value
    if not isinstance(value, list):
        raise UserError(
            f"{name} must hold a list of JSON objects, or an object with one such list. It holds {_described(value)}. "
            "If that is a row, name the file .jsonl."
        )
    for n, row in enumerate(value, start=1):
        where = f"{name}, row {n}"
        yield where, _object(where, row)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(_parsed("", line, ""), dict)
    except UserError:
        return False


def _parsed(where: str, data: bytes, hint: str) -> Any:
    """The JSON value in `data`. Raises UserError for what is not JSON, not UTF-8, or not text at all."""
    try:
        value = json.loads(data.decode())
        # JSON can escape half of a surrogate pair. No file can hold that: encoding it raises ValueError.
        if b"\\ud" in data or b"\\uD" in data:
            json.dumps(value, ensure_ascii=False).encode()
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not JSON: {error}. {hint}") from None
    return value


def _object(where: str, value: Any) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{where} must be a JSON object, is {json_type(value)}.")
    return value


def json_type(value: Any) -> str:
    """The type of a value in a row, in words: "text", "a number". Of what JSON does not have, the name of its type."""
    if isinstance(value, bool):
        return "true or false"
    if isinstance(value, int | float):
        return "a number"
    names = {str: "text", list: "a list", dict: "an object", type(None): "null"}
    return names.get(type(value), type(value).__name__)


def _described(value: Any) -> str:
    if not isinstance(value, dict) or not value:
        return json_type(value) + (" without fields" if value == {} else "")
    fields = [f"{field} ({json_type(v)}{f' of {len(v)}' if isinstance(v, list) else ''})" for field, v in value.items()]
    return f"an object with {', '.join(fields[:8])}{', …' if len(fields) > 8 else ''}"


# CSV and TSV


def _table_rows(name: str, stream: IO[bytes], delimiter: bytes) -> Iterator[tuple[str, Row]]:
    """Rows as RFC 4180 has them. Columns without a name in the header, such as an index, are left out."""
    records = _records(name, stream, delimiter)
    _, header = next(records, (1, []))
    for field in header:
        if field and header.count(field) > 1:
            raise UserError(f"{name} has several columns that are called {field!r}. Rename all but one.")
    between = "tab" if delimiter == b"\t" else "comma"
    if len(header) == 1 and (others := re.findall(r"[,;\t|]", header[0] or "")):
        raise UserError(
            f"{name} has one column, {header[0]!r}, which looks like several with {others[0]!r} between them. Save it "
            "with commas; with tabs, its name must end in .tsv."
        )
    n = 0
    for line, cells in records:
        if cells == [None]:  # an empty line
            continue
        n += 1
        where = f"{name}, row {n}"
        if len(cells) != len(header):
            raise UserError(
                f"{where} (line {line}) has {len(cells)} cells, and the header has {len(header)}. A cell with a "
                f"{between} or a line break in it must be in double quotes."
            )
        yield where, {field: cell for field, cell in zip(header, cells, strict=True) if field}


def _records(name: str, stream: IO[bytes], delimiter: bytes) -> Iterator[tuple[int, list[str | None]]]:
    """(number of its first line, its cells) for each record, the header too. An empty cell is None, "" an empty text.

    Python's csv module does not tell the two apart, and pyarrow's accepts a quote that is never closed.
    """
    cell = re.compile(CELL.replace(b"D", delimiter), re.DOTALL)
    data, at, is_whole = b"", 0, False
    cells: list[str | None] = []
    line = first_line = 1
    while True:
        match = cell.match(data, at)
        if not is_whole and (match is None or match.end() == len(data)):  # the cell may go on in what is not read yet
            # As much as there is already, so that a long cell is not scanned too often.
            more = stream.read(max(CHUNK, len(data) - at))
            data, at, is_whole = data[at:] + more, 0, not more
            continue
        if not cells:
            first_line = line
            if at == len(data):
                return
        if match is None:
            raise UserError(f"{name}, line {line}: a cell begins with a double quote, which is never closed.")
        quoted, end, plain = match[1], match[2] if match[1] is not None else match[4], match[3]
        if end not in (delimiter, b"\r\n", b"\n", b"\r", b""):
            raise UserError(
                f"{name}, line {line}: a cell goes on after its closing double quote. Quotes in a quoted cell must be "
                'doubled: "He said ""no""."'
            )
        value = plain if quoted is None else quoted.replace(b'""', b'"')
        try:
            cells.append(None if value is None else value.decode())
        except UnicodeDecodeError as error:
            raise UserError(f"{name}, line {line} is not in UTF-8: {error}. Save the file in UTF-8.") from None
        at = match.end()
        line += match[0].count(b"\n") or match[0].count(b"\r")
        if end != delimiter:
            yield first_line, cells
            cells = []


# Parquet and Arrow


def _arrow_rows(name: str, file: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow as pa

    try:
        n = 0
        for batch in _batches(file, kind_of(name) == ".parquet"):
            batch.validate(full=True)  # an Arrow file is mapped into memory as it is, whatever it holds
            encoded = [field for field in batch.schema if "arrow.json" in str(field.type)]
            for row in batch.to_pylist():
                n += 1
                for field in encoded:
                    row[field.name] = _decoded(row[field.name], field.type)
                yield f"{name}, row {n}", row
    except (pa.ArrowException, OSError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise UserError(f"data file {name} cannot be read: {reason}. Get it again, or give another file.") from None


def _batches(file: Path, is_parquet: bool) -> Iterator[Any]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    if is_parquet:
        yield from pq.ParquetFile(file).iter_batches()
        return
    with pa.memory_map(str(file)) as source:
        if source.read(6) == b"ARROW1":
            reader = pa.ipc.open_file(source)
            yield from (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            source.seek(0)
            yield from pa.ipc.open_stream(source)


def _decoded(value: Any, kind: Any) -> Any:
    """`value` of the Arrow type `kind`, with the JSON in it parsed: `datasets` keeps objects of different fields so."""
    import pyarrow as pa

    if value is None:
        return None
    if isinstance(kind, pa.JsonType):
        return json.loads(value)
    if pa.types.is_struct(kind):
        return {field.name: _decoded(value[field.name], field.type) for field in kind}
    if pa.types.is_list(kind) or pa.types.is_large_list(kind):
        return [_decoded(item, kind.value_type) for item in value]
    return value
