"""Files of rows, JSON Lines and others, and Hugging Face data sets -> rows with their places."""

import collections
import gzip
import json
import re
from pathlib import Path

from gosling.chat import BadRow
from gosling.config import UserError, print0

ROWS = re.compile(r"\.((jsonl|ndjson|json)(\.gz)?|parquet)$", re.IGNORECASE)
HUB_NAMES = "hf:DATASET:SPLIT or hf:DATASET:SUBSET:SPLIT, such as hf:openai/gsm8k:main:train[:100]"
# Half of a surrogate pair may be among these; the other half may follow.
SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")
REMEDY = "mend them, or leave them out with --skip_bad"


def holds_rows(path):
    """Whether a name says that a file holds rows, or is a hub's data set."""
    return str(path).startswith("hf:") or ROWS.search(str(path)) is not None


def load_hub(name, *args, **options):
    """datasets.load_dataset(*args, **options) -> ("name, row i", row) of each row."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name}: reading it needs `pip install datasets`") from None
    try:
        rows = datasets.load_dataset(*args, **options)
    except Exception as e:  # of many kinds: network, names, files
        expected = f"; expected {HUB_NAMES}" if name.startswith("hf:") else ""
        words = " ".join(str(e).split())[:200]
        raise UserError(f"{name}: {type(e).__name__}: {words}{expected}") from None
    for i, row in enumerate(rows):
        yield f"{name}, row {i}", row


def read_lines(path, shapes):
    """("file:line", bytes) of each line that is not empty; ("file, row i", row) of other files.

    By the name, in any case: .json may be an array, .gz is unpacked, .parquet and hf:DATASET:SPLIT
    or hf:DATASET:SUBSET:SPLIT are read by `datasets`; else it is JSONL. DATASET: a name on the
    Hugging Face hub or a folder that is laid out like one; a SPLIT may be a slice, train[:100].
    """
    name = str(path).lower()
    if name.startswith("hf:"):
        dataset = re.split(r":(?![^\[]*\])", str(path)[3:])  # not at the colon of a slice
        if len(dataset) not in (2, 3):
            raise UserError(f"{path}: expected {HUB_NAMES}")
        yield from load_hub(str(path), *dataset[:-1], split=dataset[-1])
        return
    if Path(path).is_dir():
        raise UserError(f"{path} is a folder; give a file of it, of {shapes}")
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; expected JSONL of {shapes}, or hf:DATASET:SPLIT")
    if name.endswith(".parquet"):
        yield from load_hub(str(path), "parquet", data_files=str(path), split="train")
        return
    try:
        with gzip.open(path) if name.endswith(".gz") else open(path, "rb") as f:
            values = json_array(f.read()) if name.removesuffix(".gz").endswith(".json") else None
            if values is not None:
                yield from ((f"{path}, row {i}", value) for i, value in enumerate(values))
                return
            f.seek(0)
            for number, line in enumerate(f, 1):
                if line.strip():
                    yield f"{path}:{number}", line
    except (OSError, EOFError) as e:
        raise UserError(f"{path} cannot be read: {e}") from None


def json_array(data):
    """A whole .json file -> its values, a list; None if it is not one value: then it has lines."""
    try:
        values = json.loads(data.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return values if isinstance(values, list) else [values]


def read_jsonl(path, shapes, pick=None, skipped=None):
    """("file:line", pick(row)) of each row of a file of objects, or of a hub's data set.

    shapes: what rows look like, for errors. pick: a function of a row whose UserError says what is
    wrong with it; None for the row as it is. What is wrong is an error with its place, or counted
    where `skipped` is a Counter.
    """
    for where, line in read_lines(path, shapes):
        try:
            picked = pick_row(line, shapes, pick)
        except UserError as e:
            if skipped is None:
                raise UserError(f"{where}: {e}") from None
            skipped["bad JSONL lines"] += 1
        else:
            yield where, picked


def pick_row(line, shapes, pick):
    """One line (bytes), or a row that is read already -> pick(row)."""
    try:
        row = line
        if isinstance(line, bytes):
            row = json.loads(line.decode("utf-8-sig"))
        if not isinstance(line, bytes) or SURROGATE.search(line):
            json.dumps(row, ensure_ascii=False, default=str).encode()
        if isinstance(row, dict):
            return pick(row) if pick else row
    except UnicodeError as e:  # also of half a surrogate pair, which nothing can encode
        remedy = "convert the file to UTF-8"
        if isinstance(e, UnicodeEncodeError):
            remedy = f"take {ascii(e.object[e.start : e.start + 1])}, half of a character, out"
        words = f"not UTF-8 text ({e.reason}); {remedy}; expected {shapes}"
        raise BadRow(words, "not UTF-8 text") from None
    except (ValueError, RecursionError) as e:  # ValueError: also of a number of 5,000 digits
        expected = f"expected an object a line, or in a .json file an array of them: {shapes}"
        raise BadRow(f"not JSON ({e}); {expected}", "not JSON") from None
    raise BadRow(
        f"expected a JSON object, got {row!r:.60}; an array of them lies in a .json file: {shapes}",
        "no JSON object",
    )


def read_rows(path, shapes, pick, skip_bad=False):
    """The rows of read_jsonl for training: what is wrong is counted over the whole file.

    With skip_bad bad rows are left out, counted by reason and the first three named; else they are
    an error, which says the first and how many.
    """
    reasons, first = collections.Counter(), []
    for where, line in read_lines(path, shapes):
        try:
            picked = pick_row(line, shapes, pick)
        except UserError as e:
            reasons[getattr(e, "reason", "other mistakes")] += 1
            if len(first) < 3:
                first.append(f"{where}: {e}")
        else:
            if skip_bad or not first:
                yield where, picked
    if not reasons:
        return
    counts = f"bad rows: {reasons.total():,} ({count(reasons)})"
    if not skip_bad:
        raise UserError(f"{first[0]}; {counts}; {REMEDY}")
    print0("\n  ".join([f"{path}: left out {counts}; the first:", *first]))


def count(reasons, unit=""):
    """A Counter -> "3 of this, 1 of that" """
    return ", ".join(f"{n:,} {unit}{reason}" for reason, n in reasons.most_common())
