"""Token files: RWKV-LM's MMIDIDX pair, so that its data and tools work both ways.

`.bin`: the tokens back to back, end_id after every document. `.idx`: a header, int32 sizes [D],
int64 byte offsets [D], int64 document numbers [D + 1]. All little-endian. A corpus may be larger
than memory, a document may not. Beside them `.json`, the sidecar, has the tokenizer's name or file
and its digest.
"""

import contextlib
import math
import re
import struct
from array import array
from pathlib import Path

from gosling.config import UserError
from gosling.files import atomic_write, read_json
from gosling.schemas import Sidecar
from gosling.tokenizer import agree, load_tokenizer, noted_tokenizer, recorded_tokenizer

import numpy as np

MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, documents, documents + 1
# RWKV-LM's codes; its 6 and 7 are floats. 9 is ours: it has no uint32, and refuses unknown codes.
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4"}


class TokenFile:
    """Reads `prefix`.bin and .idx by memory map; prefix may also name either file.

    tokens [N]: the whole .bin, end tokens included; sizes [D]; offsets [D] in bytes; dtype; len():
    D; meta: the sidecar's values, or {}. UserError for files that are missing or damaged.
    """

    def __init__(self, prefix):
        self.prefix = re.sub(r"\.(bin|idx)$", "", str(prefix))
        binary, index = Path(f"{self.prefix}.bin"), Path(f"{self.prefix}.idx")
        for path in (binary, index):
            if not path.is_file():
                out = re.sub("_(train|val)$", "", self.prefix)
                raise UserError(
                    f"{path} does not exist; `python prepare.py INPUT --out={out}` makes it of "
                    "text files, folders, .jsonl, or the word stdlib for this Python's sources"
                )
        head = np.fromfile(index, np.uint8, HEADER.size).tobytes()
        magic, version, code, n, m = HEADER.unpack(head.ljust(HEADER.size, b"\0"))
        is_ours = magic == MAGIC and version == 1
        check(is_ours, f"{index} does not begin with MMIDIDX and version 1")
        check(code in DTYPES, f"{index}: dtype code {code} is no integer type, such as 8 (uint16)")
        size, expected = index.stat().st_size, HEADER.size + 12 * n + 8 * m
        found = f"{n} documents, then {m}, {size} bytes, expected {expected}"
        check(size == expected and m == n + 1 > 1, f"{index} is cut off or damaged: {found}")
        self.dtype = np.dtype(DTYPES[code])
        self.sizes = np.memmap(index, "<i4", "r", HEADER.size, n)
        self.offsets = np.memmap(index, "<i8", "r", HEADER.size + 4 * n, n)
        size = binary.stat().st_size
        expected = int(self.sizes.sum(dtype=np.int64)) * self.dtype.itemsize
        found = f"{size} bytes, expected {expected}"
        check(size == expected > 0, f"{binary} is cut off, or not of this index: {found}")
        self.check_documents(index)
        self.tokens = np.memmap(binary, self.dtype, "r")
        self.meta = read_json(f"{self.prefix}.json", Sidecar)

    def check_documents(self, index):
        """UserError unless every document begins where the one before it ends."""
        end = 0
        for first in range(0, len(self.sizes), 2**20):
            sizes = self.sizes[first : first + 2**20].astype(np.int64) * self.dtype.itemsize
            begins = end + np.cumsum(sizes) - sizes
            wrong = np.flatnonzero((sizes < 0) | (self.offsets[first : first + 2**20] != begins))
            if len(wrong):
                raise UserError(
                    f"{index} is damaged: document {first + wrong[0]} does not begin where the "
                    "one before it ends; prepare the data again, or copy both files again"
                )
            end += int(sizes.sum())

    def __len__(self):
        return len(self.sizes)

    def doc(self, i):
        """The tokens of document i, its end token included: a view [sizes[i]] of the .bin."""
        start = int(self.offsets[i]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sizes[i])]

    def tokenizer(self):
        """The tokenizer that the sidecar names; None if there is no sidecar.

        UserError if its file was changed since.
        """
        if not self.meta.get("tokenizer"):
            return None
        return noted_tokenizer(self.meta, f"{self.prefix}.json")

    def check_vocab(self, vocab_size):
        """UserError if an id is not below vocab_size, with that id and where it is.

        Every token is read, unless the dtype or the sidecar already says that all of them fit.
        """
        largest = min(self.meta.get("vocab_size", math.inf), np.iinfo(self.dtype).max + 1)
        if largest <= vocab_size:
            return
        for position in (int(self.tokens.argmin()), int(self.tokens.argmax())):
            if 0 <= self.tokens[position] < vocab_size:
                continue
            byte = position * self.dtype.itemsize
            document = int(np.searchsorted(self.offsets, byte, "right")) - 1
            raise UserError(
                f"{self.prefix}.bin: id {self.tokens[position]} at token {position} (document "
                f"{document}) does not fit vocab_size {vocab_size}; use the model's tokenizer"
            )


def tokenizer_of_data(files, name="", weights="", vocab_size=0):
    """The one tokenizer of token files, of --tokenizer `name` and of the model `weights`.

    UserError if two of those that are known have different ones, whatever their sizes, or if none
    is known. A bare model of 65536 ids has World, unless `name` says otherwise.
    """
    tokenizers = {}
    if name:
        tokenizers[f"--tokenizer={name}"] = load_tokenizer(name)
    for file in files:
        tokenizers[file.prefix] = file.tokenizer()
    if weights:
        tokenizers[weights] = recorded_tokenizer(weights, vocab_size, name)
    agree(tokenizers)
    for tokenizer in tokenizers.values():
        if tokenizer:
            return tokenizer
    raise UserError(
        f"{files[0].prefix} has no note of its tokenizer beside it; say --tokenizer=world "
        "(RWKV-LM's own data), or the name or file it was made with"
    )


def check(is_good, problem):
    if not is_good:
        raise UserError(f"{problem}; prepare the data again, or copy both files again")


@contextlib.contextmanager
def TokenFileWriter(prefix, dtype):
    """`with TokenFileWriter(prefix, np.uint16) as writer: writer.add(ids)`, a call a document.

    At the end .bin and .idx get their names; an exception on the way leaves neither.
    """
    dtype = np.dtype(dtype).newbyteorder("<")
    with atomic_write(f"{prefix}.idx") as index, atomic_write(f"{prefix}.bin") as binary:
        with open(binary, "wb") as f:
            writer = DocumentWriter(prefix, dtype, f)
            yield writer
        index.write_bytes(index_bytes(writer.sizes, dtype))


class DocumentWriter:
    """Appends documents to an open .bin; sizes: their lengths so far."""

    def __init__(self, prefix, dtype, file):
        self.prefix, self.dtype, self.file = prefix, dtype, file
        self.sizes = array("i")

    def add(self, ids):
        """One document, its end token included. UserError for an id that the dtype cannot hold."""
        ids, limit = np.asarray(ids), np.iinfo(self.dtype).max
        # A cast would wrap around and say nothing.
        if len(ids) and not 0 <= ids.min() <= ids.max() <= limit:
            found = f"an id among {ids.min()}..{ids.max()}"
            raise UserError(f"{self.prefix}: {found} is outside 0..{limit} of {self.dtype}")
        self.file.write(ids.astype(self.dtype).tobytes())
        self.sizes.append(len(ids))


def index_bytes(sizes, dtype):
    """The .idx of documents of these sizes."""
    code = next(code for code, name in DTYPES.items() if np.dtype(name) == dtype)
    n, lengths = len(sizes), np.array(sizes, "<i4")
    offsets = (np.cumsum(lengths, dtype="<i8") - lengths) * dtype.itemsize
    header = HEADER.pack(MAGIC, 1, code, n, n + 1)
    return header + lengths.tobytes() + offsets.tobytes() + np.arange(n + 1, dtype="<i8").tobytes()
