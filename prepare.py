"""Text, JSONL and integers to token files; tokenizers; the chat template.

    python prepare.py INPUT... --out=data/name --tokenizer=world|bytes|integers:359|bpe:4096|FILE --val=0.01
        INPUT: text files, folders (every UTF-8 text file below, hidden ones left out), .jsonl with {"text": "..."}
        lines, .npy integer arrays, or the word stdlib: the sources of this Python's standard library.
        A text file is one document; so is a JSONL line, a 1-D array, a row of a 2-D array.
        Writes data/name_train and data/name_val, each .bin .idx .json, and beside them a tokenizer that is a file.
    python prepare.py inspect FILE                        what a token file holds
    python prepare.py vocab TOKENS.txt --out=vocab.txt    a vocab file from a list of tokens, one per line

Token files are RWKV-LM's MMIDIDX pair. `.bin`: the tokens back to back, end_id after every document. `.idx`: a header,
int32 sizes [D], int64 byte offsets [D], int64 document numbers [D + 1]. All little-endian.
"""
import ast
import collections
import contextlib
import dataclasses
import functools
import json
import lzma
import os
import random
import re
import shutil
import struct
import sys
import sysconfig
from array import array
from pathlib import Path

import numpy as np
import pyrwkv_tokenizer
import tokenizers
import tyro
from tokenizers import decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from common import UserError, atomic_write, read_flags

# ---------------------------------------------------------------------------------------------------------------------
# tokenizers: encode(str) -> list[int], decode(list[int]) -> str, vocab_size, end_id. For this file also: name if built
# in, else file_name and text, to save it; encode_batch if there is a fast one; line_safe: no token reaches from a line
# into the first character of the next, so a long text may be encoded in pieces (see in_batches).


class BytesTokenizer:
    """One token per UTF-8 byte, id = byte + 1 as in World; 0 ends a document."""
    name, vocab_size, end_id, line_safe = "bytes", 257, 0, True

    def encode(self, text):
        return [byte + 1 for byte in text.encode()]

    def decode(self, ids):
        return bytes(i - 1 for i in ids if 1 <= i <= 256).decode("utf-8", "replace")


class IntegersTokenizer:
    """Integers 0..maximum, as text with white space between or as arrays; id = value + 1, 0 ends a document."""
    end_id, line_safe = 0, True

    def __init__(self, maximum):
        self.name, self.maximum, self.vocab_size = f"integers:{maximum}", maximum, maximum + 2

    def encode(self, text):
        try:
            values = np.array([int(word) for word in text.split()], dtype=np.int64)
        except (ValueError, OverflowError) as e:
            raise UserError(f"{str(e)[:100]}; {self.name} reads integers with white space between") from None
        return self.encode_array(values)

    def encode_array(self, values):
        """values [T], any integer dtype -> list of T ids; UserError with the first value outside 0..maximum."""
        bad = np.flatnonzero((values < 0) | (values > self.maximum))
        if len(bad):
            raise UserError(f"value {values[bad[0]]} at position {bad[0]} is outside 0..{self.maximum} of {self.name}; "
                            f"shift the values, or use integers:MAX with their largest, here {values.max()}")
        return (values.astype(np.int64) + 1).tolist()

    def decode(self, ids):
        return " ".join(str(i - 1) for i in ids if 1 <= i <= self.maximum + 1)


class VocabTokenizer:
    """A vocab file in World's format: greedy longest match on UTF-8 bytes; 0 ends a document."""
    file_name, end_id = "vocab.txt", 0

    def __init__(self, text, source):
        self.text, self.source, self.tokens = text, source, parse_vocab(text, source)
        self.ids, self.vocab_size = {token: i for i, token in self.tokens.items()}, max(self.tokens) + 1
        self.line_safe = not any(re.search(rb"\n\S", token) for token in self.ids)
        lengths = collections.defaultdict(set)
        for token in self.ids:
            lengths[token[0]].add(len(token))
        self.lengths = {byte: sorted(found, reverse=True) for byte, found in lengths.items()}  # to try, by first byte

    def encode(self, text):
        data, ids, at = text.encode(), [], 0
        while at < len(data):
            length = next((n for n in self.lengths.get(data[at], ()) if data[at:at + n] in self.ids), 0)
            if not length:
                raise UserError(f"no token of {self.source} fits {data[at:at + 12].decode('utf-8', 'replace')!r} (byte "
                                f"{at}); a vocab file needs a token for every character of the text, so add it")
            ids.append(self.ids[data[at:at + length]])
            at += length
        return ids

    def decode(self, ids):
        # Bytes are joined first: a character may lie over two tokens, or be cut. Ids that are no token are nothing.
        return b"".join(self.tokens.get(i, b"") for i in ids).decode("utf-8", "replace")


class WorldTokenizer(VocabTokenizer):
    """RWKV's World vocabulary, encoded in Rust. Ids 1..65529 are tokens; the rest of the 65536 is unused."""
    name = "world"

    def __init__(self):
        rust = pyrwkv_tokenizer.RWKVTokenizer()  # its decode stops at half a character, ours does not
        super().__init__(Path(rust.vocab_filepath).read_bytes().decode(), rust.vocab_filepath)
        self.encode, self.encode_batch, self.vocab_size = rust.encode, rust.encode_batch, 65536


class WordsTokenizer:
    """A vocab file with one token per line: text is split at white space, id = place in the file + 1, 0 = end."""
    file_name, end_id, line_safe = "vocab.txt", 0, True

    def __init__(self, text, source):
        self.text, self.source, self.words = text, source, read_token_list(text, source)
        for word in self.words:
            if len(word.split()) != 1:
                raise UserError(f"{source}: {word!r} holds white space, so this is no list of words; to have such "
                                "tokens make a vocab file of it: python prepare.py vocab TOKENS.txt --out=vocab.txt")
        self.ids, self.vocab_size = {word: i for i, word in enumerate(self.words, 1)}, len(self.words) + 1

    def encode(self, text):
        words = text.split()
        for n, word in enumerate(words):
            if word not in self.ids:
                raise UserError(f"word {word!r} (number {n}) is not in {self.source}; add it or mend the text")
        return [self.ids[word] for word in words]

    def decode(self, ids):
        return " ".join(self.words[i - 1] for i in ids if 1 <= i <= len(self.words))


class HubTokenizer:
    """A Hugging Face tokenizer.json. Text stays text: nothing is added around it, and "<|endoftext|>" written in a
    document is encoded letter by letter, not as the document's end."""
    file_name = "tokenizer.json"

    def __init__(self, text, source):
        try:
            self.text, self.hub = text, tokenizers.Tokenizer.from_str(text)
        except Exception as e:  # the library raises bare Exception
            raise UserError(f"{source} is not a Hugging Face tokenizer.json ({str(e)[:120]})") from None
        self.hub.encode_special_tokens = True
        self.hub.no_padding()
        self.hub.no_truncation()
        ends = [self.hub.token_to_id(end) for end in ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")]
        self.end_id = next((i for i in ends if i is not None), None)
        if self.end_id is None:
            raise UserError(f"{source} has no token that ends a document; expected <|endoftext|>, </s>, <eos> or "
                            "<|end_of_text|>: add one to its vocabulary")
        self.vocab_size = max(self.hub.get_vocab(with_added_tokens=True).values()) + 1
        split = self.hub.pre_tokenizer
        self.line_safe = (self.hub.normalizer is None and isinstance(split, pre_tokenizers.ByteLevel)
                          and split.use_regex and not split.add_prefix_space)

    def encode(self, text):
        return self.hub.encode(text, add_special_tokens=False).ids

    def encode_batch(self, texts):
        return [encoding.ids for encoding in self.hub.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids):
        ids = [i for i in ids if i != self.end_id and 0 <= i < self.vocab_size]
        return self.hub.decode(ids, skip_special_tokens=False)


def train_bpe(texts, size):
    """Byte-level BPE from an iterator of str: id 0 = <|endoftext|>, the 256 bytes, then merges up to `size` tokens."""
    hub = tokenizers.Tokenizer(models.BPE())
    hub.pre_tokenizer, hub.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    hub.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=size, special_tokens=["<|endoftext|>"],
                                                       initial_alphabet=alphabet, show_progress=False))
    return HubTokenizer(hub.to_str(pretty=True), "the trained tokenizer")


VOCAB_LINE = re.compile(r"(\d+) (b?['\"].*['\"]) (\d+)\r?")


def parse_vocab(text, source):
    """A vocab file in World's format, `id literal bytelength` lines -> {id: bytes}."""
    tokens, seen = {}, set()
    for number, line in enumerate(text.split("\n"), 1):  # splitlines would also cut at '\x85' and the like
        if not line.strip() or line.startswith("#"):
            continue
        try:
            i, literal, length = VOCAB_LINE.fullmatch(line).groups()
            token = ast.literal_eval(literal)
            token = token.encode() if isinstance(token, str) else token
            good = 0 < len(token) == int(length)
        except (AttributeError, ValueError, SyntaxError):
            good = False
        if not good:
            raise UserError(f"{source}, line {number}: expected `id 'token' bytelength`, got {line[:60]!r}")
        if int(i) in tokens or token in seen or int(i) < 1:
            raise UserError(f"{source}, line {number}: id {i} or token {token!r} is taken (0 is a document's end)")
        tokens[int(i)] = token
        seen.add(token)
    return tokens


def read_token_list(text, source):
    """One token per line -> list[str]. Empty lines and lines that begin with # are left out; no token twice."""
    first = {}
    for number, line in enumerate(text.split("\n"), 1):
        token = line.removesuffix("\r")
        if token in first:
            raise UserError(f"{source}, line {number}: {token!r} is already on line {first[token]}; remove one of them")
        if token and not token.startswith("#"):
            first[token] = number
    if not first:
        raise UserError(f"{source} holds no tokens; expected one per line")
    return list(first)


def load_tokenizer(name_or_path):
    """world, bytes, integers:MAX, a vocab file, a tokenizer.json, or a folder that holds or names one -> tokenizer."""
    name, path = str(name_or_path), Path(name_or_path)
    if name in ("world", "bytes"):
        return WorldTokenizer() if name == "world" else BytesTokenizer()
    if re.fullmatch("integers:[0-9]+", name):
        return IntegersTokenizer(int(name.partition(":")[2]))
    if path.is_dir():
        return folder_tokenizer(path)
    if not path.is_file():
        raise UserError(f"tokenizer '{name}': no such name or file; choose world, bytes, integers:MAX (integers:359), "
                        "a vocab file, a tokenizer.json, a folder with one, or to prepare data bpe:SIZE (bpe:4096)")
    text = read_text(path)
    if path.suffix == ".json":
        return HubTokenizer(text, path)
    lines = [line for line in text.split("\n") if line.strip() and not line.startswith("#")]
    if not lines or not VOCAB_LINE.fullmatch(lines[0]):
        return WordsTokenizer(text, path)
    tokenizer = VocabTokenizer(text, path)
    is_world = tokenizer.vocab_size == 65530 and tokenizer.tokens == (world := WorldTokenizer()).tokens
    return world if is_world else tokenizer


def folder_tokenizer(folder):
    """The tokenizer of a run's or a data folder: what config.json names, else the one tokenizer file in it."""
    config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
    if isinstance(config.get("tokenizer"), str) and config["tokenizer"]:
        return named_tokenizer(config["tokenizer"], folder)
    for pattern in ("tokenizer.json", "vocab.txt", "*.tokenizer.json", "*.vocab.txt"):
        found = list(folder.glob(pattern))
        if len(found) == 1:
            return load_tokenizer(found[0])
    raise UserError(f"{folder}: expected one tokenizer in it (a config.json with a \"tokenizer\" entry, a "
                    "tokenizer.json, a vocab.txt), found none or several; name the tokenizer itself")


def named_tokenizer(entry, folder):
    """What a config.json or a sidecar in `folder` says under "tokenizer": a file in that folder, else a name."""
    return load_tokenizer(Path(folder) / entry if (Path(folder) / entry).is_file() else entry)


def save_tokenizer(tokenizer, folder, prefix=""):
    """-> what config.json should hold under "tokenizer": a built-in's name, or the name of the file that this wrote to
    `folder`, tokenizer.json or vocab.txt (after `prefix`)."""
    if hasattr(tokenizer, "name"):
        return tokenizer.name
    with atomic_write(Path(folder) / (prefix + tokenizer.file_name)) as tmp:
        tmp.write_bytes(tokenizer.text.encode())
    return prefix + tokenizer.file_name


# ---------------------------------------------------------------------------------------------------------------------
# chat

ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}
THINK = {"on": " <think", "off": " <think>\n</think"}  # G1's prefixes; the last bracket is the model's to write


def render_chat(messages, tokenizer, *, generation_prompt=False, last_reply_only=False, think=None):
    """[{"role", "content"}] -> (ids, mask), lists of one length, in the template of RWKV's World and G1 models:
    "System: ...", "User: ...", "Assistant: ..." with a blank line between, end_id after a last reply.

    mask: 1 on the assistant's words and on what ends them (the blank line before a next turn, or end_id), else 0.
    last_reply_only: 1 on the last reply alone. generation_prompt: end in "Assistant:", without a space, for the model
    to go on, and after it `think`: "on", "off" or a prefix of your own. Prompts, replies and the blank lines after
    replies are tokenised apart, so that a chat's ids stay a prefix of the longer chat's. UserError for an unknown role,
    an empty reply, no messages.
    """
    if not messages:
        raise UserError("a chat needs at least one message")
    if think is not None and not generation_prompt:
        raise UserError("think is what a reply begins with; it needs generation_prompt=True")
    ids, mask, prompt = [], [], ""

    def put(part, learn):
        ids.extend(part)
        mask.extend([int(learn)] * len(part))

    last_reply = max((n for n, m in enumerate(messages) if m.get("role") == "assistant"), default=None)
    for n, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if role not in ROLES or not isinstance(content, str):
            raise UserError(f"message {n}: expected a role of system, user, assistant and a string content, got role "
                            f"{role!r} and a content of type {type(content).__name__}")
        # A turn opens after a blank line and content holds none: "User: " on a line of its own in it is just text.
        content = re.sub(r"\n{2,}", "\n", content.strip())
        if role != "assistant":
            prompt += f"{ROLES[role]}: {content}".rstrip() + "\n\n"
            continue
        if not content:
            raise UserError(f"message {n}: the assistant's reply is empty; leave the message out")
        learn = n == last_reply or not last_reply_only
        put(tokenizer.encode(prompt + "Assistant:"), False)
        put(tokenizer.encode(" " + content), learn)
        is_end = n == len(messages) - 1 and not generation_prompt
        put([tokenizer.end_id] if is_end else tokenizer.encode("\n\n"), learn)
        prompt = ""
    if generation_prompt:
        put(tokenizer.encode(prompt + "Assistant:"), False)
        put(tokenizer.encode(THINK.get(think, think)) if think else [], False)
    elif prompt:
        put(tokenizer.encode(prompt.removesuffix("\n\n")), False)
    return ids, mask


# ---------------------------------------------------------------------------------------------------------------------
# token files

MAGIC, HEADER = b"MMIDIDX\x00\x00", struct.Struct("<9sQBQQ")  # magic, version, dtype code, documents, documents + 1
# RWKV-LM's codes; its 6 and 7 are floats. 9 is ours: it has no uint32, and refuses a code that it does not know.
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4"}
BLOCK = 1 << 24  # tokens looked at in one go


class TokenFile:
    """Reads `prefix`.bin and .idx by memory map ('x', 'x.bin' or 'x.idx'). UserError if one is missing or damaged.

    tokens [N]: the whole .bin, end tokens included; sizes [D]; doc(i): the tokens of document i; len(): D; meta: the
    sidecar `prefix`.json, or {}.
    """

    def __init__(self, prefix):
        self.prefix = re.sub(r"\.(bin|idx)$", "", str(prefix))
        binary, index, sidecar = (Path(f"{self.prefix}.{end}") for end in ("bin", "idx", "json"))

        def check(good, problem, remedy="prepare the data again, or copy both files again"):
            if not good:
                raise UserError(f"{problem}; {remedy}")

        for path in (binary, index):
            check(path.is_file(), f"{path} does not exist", f"did you mean {self.prefix}_train?" if
                  Path(f"{self.prefix}_train.idx").is_file() else "data is a .bin and an .idx, made by prepare.py")
        size, head = index.stat().st_size, np.fromfile(index, np.uint8, HEADER.size).tobytes()
        check(head[:9] == MAGIC, f"{index} does not begin with MMIDIDX, so it is no index of RWKV-LM's format")
        check(len(head) == HEADER.size, f"{index} is cut off: {size} bytes, expected at least {HEADER.size}")
        _, version, code, n, m = HEADER.unpack(head)
        check(version == 1, f"{index} is version {version}, expected 1")
        check(code in DTYPES, f"{index}: dtype code {code} is {'floating point' if code in (6, 7) else 'unknown'}, "
              "expected integers such as 8 (uint16)")
        expected = HEADER.size + 12 * n + 8 * m
        check(size == expected, f"{index} is cut off or damaged: {size} bytes, expected {expected} for {n} documents")
        self.dtype, table = np.dtype(DTYPES[code]), np.memmap(index, np.uint8, "r")
        self.sizes = table[HEADER.size:HEADER.size + 4 * n].view("<i4")
        self.offsets = table[HEADER.size + 4 * n:HEADER.size + 12 * n].view("<i8")  # in bytes
        expected, size = int(self.sizes.sum(dtype=np.int64)) * self.dtype.itemsize, binary.stat().st_size
        check(size == expected, f"{binary} is cut off, or not of this index: {size} bytes, expected {expected}")
        check(size > 0, f"{binary} holds no tokens")
        self.tokens = np.memmap(binary, self.dtype, "r")
        self.meta = read_json(sidecar) if sidecar.is_file() else {}

    def __len__(self):
        return len(self.sizes)

    def doc(self, i):
        """The tokens of document i, its end token included: a view [sizes[i]] of the .bin."""
        start = int(self.offsets[i]) // self.dtype.itemsize
        return self.tokens[start:start + int(self.sizes[i])]

    def tokenizer(self):
        """The tokenizer that the sidecar names; None if there is no sidecar."""
        return named_tokenizer(self.meta["tokenizer"], Path(self.prefix).parent) if "tokenizer" in self.meta else None

    def largest_id(self):
        """-> (largest id, its first place in tokens). A negative id, never right, counts as the largest."""
        best, place = -1, 0
        for start in range(0, len(self.tokens), BLOCK):
            block = self.tokens[start:start + BLOCK]
            at = int(block.argmin() if block.min() < 0 else block.argmax())
            if block[at] < 0:
                return int(block[at]), start + at
            if block[at] > best:
                best, place = int(block[at]), start + at
        return best, place

    def check_vocab(self, vocab_size):
        """UserError if an id is not below vocab_size, with the largest one and where it is. Reads every token."""
        largest, place = self.largest_id()
        if not 0 <= largest < vocab_size:
            document = int(np.searchsorted(self.offsets, place * self.dtype.itemsize, "right")) - 1
            raise UserError(f"{self.prefix}.bin: id {largest} at token {place} (document {document}) does not fit "
                            f"vocab_size {vocab_size}; prepare the data with the model's tokenizer, or make the "
                            "model's vocabulary larger")


class TokenFileWriter:
    """`with TokenFileWriter(prefix, np.uint16) as f: f.add(ids)`, a call a document, its end token included. At the end
    .bin and .idx get their names; an exception on the way leaves neither."""

    def __init__(self, prefix, dtype):
        self.prefix, self.dtype = str(prefix), np.dtype(dtype).newbyteorder("<")
        self.sizes, self.size = array("i"), 0

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            self.index = stack.enter_context(atomic_write(self.prefix + ".idx"))
            self.file = stack.enter_context(open(stack.enter_context(atomic_write(self.prefix + ".bin")), "wb"))
            stack.callback(self._write_index)  # last in, first out: the index is written before a rename
            self.stack = stack.pop_all()
        return self

    def __exit__(self, *error):
        return self.stack.__exit__(*error)

    def add(self, ids, *, more=False):
        """ids: list or array [T]. more: the next call goes on with this document."""
        ids, limit = np.asarray(ids), np.iinfo(self.dtype).max
        if len(ids) and not 0 <= ids.min() <= ids.max() <= limit:  # a cast would wrap around and say nothing
            raise UserError(f"{self.prefix}: an id among {ids.min()}..{ids.max()} is outside 0..{limit}; "
                            f"{self.dtype.name} cannot hold it")
        self.file.write(ids.astype(self.dtype).tobytes())
        self.size += len(ids)
        if self.size >= 2**31:
            raise UserError(f"{self.prefix}: a document has 2^31 tokens or more, which .idx cannot count; split it")
        if not more:
            self.sizes.append(self.size)
            self.size = 0

    def _write_index(self):
        n, sizes = len(self.sizes), np.array(self.sizes, "<i4")
        offsets = (np.cumsum(sizes, dtype="<i8") - sizes) * self.dtype.itemsize
        code = {np.dtype(name): code for code, name in DTYPES.items()}[self.dtype]
        with open(self.index, "wb") as f:
            f.write(HEADER.pack(MAGIC, 1, code, n, n + 1))
            f.write(sizes.tobytes() + offsets.tobytes() + np.arange(n + 1, dtype="<i8").tobytes())


# ---------------------------------------------------------------------------------------------------------------------
# reading what the user gives

def read_text(path):
    """A UTF-8 file -> str, its line ends as they are, without a byte order mark."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig")
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(f"{path} is not UTF-8 text (byte {e.start} is 0x{e.object[e.start]:02x}); convert it, or leave "
                        "it out") from None


def read_json(path):
    """A file with a JSON object -> dict."""
    with contextlib.suppress(ValueError):
        if isinstance(value := json.loads(read_text(path)), dict):
            return value
    raise UserError(f"{path} is not a JSON object; mend or remove it")


def list_files(inputs):
    """-> [(path, named)]. A file that the user named must be text; one that a folder brought may be left out."""
    files = []
    for word in inputs:
        if word == "stdlib":
            skip = {"site-packages", "dist-packages", "test", "tests"}
            files += [(path, False) for path in walk(sysconfig.get_path("stdlib"), skip) if path.suffix == ".py"]
        elif Path(word).is_dir():
            files += [(path, False) for path in walk(word)]
        elif Path(word).is_file():
            files.append((Path(word), True))
        else:
            raise UserError(f"{word} does not exist; INPUT is text files, folders, .jsonl, .npy, or the word stdlib")
    return files


def walk(root, skip=()):
    """Every file below root, sorted by path; hidden ones are left out, as is what lies in folders named in `skip`."""
    found = []
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if not name.startswith(".") and name not in skip]
        found += [Path(folder, name) for name in names if not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def read_documents(files, skip_bad, skipped):
    """Yield (where, document), a document being str or an integer array [T]. skipped: Counter of what was left out."""
    for path, named in files:
        read = {".jsonl": read_jsonl, ".npy": read_npy}.get(path.suffix, read_text_file)
        try:
            for where, document in read(path, named, skip_bad, skipped):
                if len(document):
                    yield where, document
                else:
                    skipped["empty documents"] += 1
        except OSError as e:
            raise UserError(f"{path} cannot be read: {e.strerror or e}") from None


def read_text_file(path, named, skip_bad, skipped):
    if named or is_text(path.read_bytes()):
        yield str(path), read_text(path)
    else:
        skipped["files that are not UTF-8 text"] += 1


def is_text(data):
    with contextlib.suppress(UnicodeDecodeError):
        return "\0" not in data.decode()  # some binary files are valid UTF-8
    return False


def read_jsonl(path, named, skip_bad, skipped):
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            text, problem = read_line(line)
            if text is not None:
                yield f"{path}, line {number}", text
            elif skip_bad:
                skipped["bad JSONL lines"] += 1
            else:
                raise UserError(f'{path}, line {number}: {problem}; expected {{"text": "..."}}; mend it, or leave such '
                                "lines out with --skip_bad")


def read_line(line):
    """A JSONL line (bytes) -> (its "text", None) or (None, what is wrong with it)."""
    try:
        row = json.loads(line.decode("utf-8-sig"))
        if not isinstance(row, dict):
            return None, f"a JSON {type(row).__name__}, not an object"
        if not isinstance(row.get("text"), str):
            return None, f'no string "text" in it (keys: {", ".join(row)})'
        row["text"].encode()
        return row["text"], None
    except json.JSONDecodeError as e:
        return None, f"not JSON ({e.msg}, column {e.colno})"
    except (UnicodeError, RecursionError) as e:  # \ud83d alone, half of a surrogate pair, is no character either
        return None, f"not Unicode text ({str(e)[:80]})"


def read_npy(path, named, skip_bad, skipped):
    try:
        values = np.load(path, mmap_mode="r", allow_pickle=False)
    except ValueError as e:
        raise UserError(f"{path} cannot be read as a .npy array: {e}") from None
    if values.dtype.kind not in "iu" or values.ndim not in (1, 2):
        raise UserError(f"{path} is {values.dtype} with {values.ndim} dimensions; expected integers, 1-D (a document) "
                        "or 2-D (a document a row); convert it with .astype(np.int64)")
    for number, row in enumerate(np.atleast_2d(values)):
        yield (f"{path}, row {number}" if values.ndim == 2 else str(path)), row


# ---------------------------------------------------------------------------------------------------------------------
# preparing

@dataclasses.dataclass
class Config:
    inputs: tyro.conf.Positional[tuple[str, ...]]  # text files, folders, .jsonl, .npy, or the word stdlib
    out: str  # prefix of what is written: data/name gives data/name_train.bin and so on
    tokenizer: str = "world"  # world, bytes, integers:MAX, bpe:SIZE (trained here), a vocab file or a tokenizer.json
    val: float = 0.01  # part of the documents that goes to validation, at least one; 0: no validation file
    seed: int = 0  # which documents those are
    skip_bad: bool = False  # leave out and count JSONL lines that cannot be read, instead of stopping at the first


PIECE, BATCH = 1 << 18, 1 << 20  # characters encoded as one text, and in one go
XZ_LIMIT = 64 << 20  # bytes of validation text up to which xz -9 is run, for the reader to compare a model with


def prepare(cfg):
    """Inputs -> token files; returns {"train": sidecar, "val": sidecar}. The input is read twice, three times with
    bpe:SIZE; of documents no longer in hand only the sizes are kept. UserError leaves no file behind."""
    if not 0 <= cfg.val < 1:
        raise UserError(f"--val={cfg.val}: expected a part from 0 (no validation) to below 1, such as 0.01")
    bpe_size = int(cfg.tokenizer[4:]) if re.fullmatch("bpe:[0-9]+", cfg.tokenizer) else None
    if cfg.tokenizer.startswith("bpe:") and (bpe_size or 0) < 257:
        raise UserError(f"--tokenizer={cfg.tokenizer}: expected bpe:SIZE, SIZE >= 257 (the end token and 256 bytes)")
    tokenizer = None if bpe_size else load_tokenizer(cfg.tokenizer)
    files = list_files(cfg.inputs)
    for path, _ in files:
        if path.suffix == ".npy" and not isinstance(tokenizer, IntegersTokenizer):
            raise UserError(f"{path}: integer arrays need --tokenizer=integers:MAX, MAX being their largest value")

    skipped, sizes = collections.Counter(), array("q")
    for document in progress(read_documents(files, cfg.skip_bad, skipped), "reading"):
        sizes.append(n_bytes(document[-1]))
    if not sizes:
        raise UserError(f"no documents in {' '.join(cfg.inputs) or 'no INPUT'}"
                        + "".join(f"; left out {n} {what}" for what, n in skipped.items()))
    chosen = choose_validation(len(sizes), cfg.val, cfg.seed)
    documents = functools.partial(split_documents, files, cfg, len(sizes), chosen)
    if bpe_size:
        corpus = progress(documents(), f"training {cfg.tokenizer}", sum(sizes))
        tokenizer = train_bpe((document for split, _, document in corpus if split == "train"), bpe_size)
    val_size = sum(sizes[i] for i in chosen) if len(sizes) > 1 else sizes[0] * cfg.val
    with_xz = bool(cfg.val) and val_size <= XZ_LIMIT
    with staging_folder(cfg.out) as folder:
        reports = write_splits(progress(documents(), "encoding", sum(sizes)), tokenizer, folder / Path(cfg.out).name,
                               ("train", "val") if cfg.val else ("train",), with_xz)
    print_summary(cfg, reports, skipped, lone_document=len(sizes) == 1)
    return reports


def choose_validation(n, val, seed):
    """A set of round(n * val) of the numbers 0..n-1, but at least one, and not all."""
    count = min(max(round(n * val), 1), n - 1) if val else 0
    return set(random.Random(seed).sample(range(n), count))


def split_documents(files, cfg, n, chosen):
    """Yield ("train" or "val", where, document). A lone document (n = 1) is cut in two."""
    for i, (where, document) in enumerate(read_documents(files, cfg.skip_bad, collections.Counter())):
        if n == 1 and cfg.val:
            cut = find_cut(document, 1 - cfg.val, where)
            yield "train", where, document[:cut]
            yield "val", where, document[cut:]
        else:
            yield ("val" if i in chosen else "train"), where, document


def find_cut(document, part, where):
    """Where to cut a document for about `part` of it to come first: after a line, else after a space."""
    if len(document) < 2:
        raise UserError(f"{where} is one document of length 1, not enough for training and validation; use --val=0")
    aim = min(max(round(len(document) * part), 1), len(document) - 1)
    for border in "\n " if isinstance(document, str) else "":
        cuts = (document.rfind(border, 0, aim) + 1, document.find(border, aim) + 1)
        cuts = [cut for cut in cuts if 0 < cut < len(document)]
        if cuts:
            return min(cuts, key=lambda cut: abs(cut - aim))
    return aim


def in_batches(documents, line_safe):
    """Yield lists of (split, where, piece, last), BATCH characters or so in all: documents whole, or in pieces of about
    PIECE, so that a long one takes little memory. A text is cut only between lines that end and begin with something
    else than white space, and only for a tokenizer whose tokens never reach over such a place: the ids stay as they
    are without a cut."""
    batch, held, border = [], 0, re.compile(r"(?<=\S)\n(?=\S)")
    for split, where, document in documents:
        start, n = 0, len(document)
        while start < n:
            end = min(start + PIECE, n)
            if end < n and isinstance(document, str):
                found = border.search(document, end) if line_safe else None
                end = found.end() if found else n
            batch.append((split, where, document[start:end], end == n))
            start, held = end, held + end - start
            if held >= BATCH:
                yield batch
                batch, held = [], 0
    yield batch


def encode_batch(batch, tokenizer):
    """-> the ids of each piece. An error says in which file and line."""
    if hasattr(tokenizer, "encode_batch"):  # uses all cores
        return tokenizer.encode_batch([piece for _, _, piece, _ in batch])
    encoded = []
    for _, where, piece, _ in batch:
        try:
            encoded.append((tokenizer.encode if isinstance(piece, str) else tokenizer.encode_array)(piece))
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
    return encoded


def write_splits(documents, tokenizer, prefix, splits, with_xz):
    """(split, where, document)s -> prefix_<split>.bin .idx .json and the tokenizer's file; returns {split: sidecar}."""
    dtype = np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32
    text_bytes, xz, xz_bytes = collections.Counter(), lzma.LZMACompressor(preset=9) if with_xz else None, 0
    with contextlib.ExitStack() as stack:
        writers = {split: stack.enter_context(TokenFileWriter(f"{prefix}_{split}", dtype)) for split in splits}
        for batch in in_batches(documents, tokenizer.line_safe):
            for (split, _, piece, last), ids in zip(batch, encode_batch(batch, tokenizer)):
                writers[split].add(ids + [tokenizer.end_id] if last else ids, more=not last)
                if isinstance(piece, str):
                    text_bytes[split] += n_bytes(piece)
                    if split == "val" and xz:
                        xz_bytes += len(xz.compress(piece.encode()))
    entry, reports = save_tokenizer(tokenizer, prefix.parent, prefix=f"{prefix.name}."), {}
    for split in splits:
        sizes, size = writers[split].sizes, text_bytes[split] or None
        reports[split] = {
            "tokenizer": entry, "vocab_size": tokenizer.vocab_size, "documents": len(sizes), "tokens": sum(sizes),
            "bytes": size, "bytes_per_token": size and size / sum(sizes), "longest_document": max(sizes)}
        if split == "val" and xz and size:
            reports[split]["xz_bits_per_byte"] = 8 * (xz_bytes + len(xz.flush())) / size
        with atomic_write(f"{prefix}_{split}.json") as tmp:
            tmp.write_text(json.dumps(reports[split], indent=1) + "\n")
    return reports


@contextlib.contextmanager
def staging_folder(out):
    """A hidden folder beside `out`. In the end its files move to their place; after an error nothing is left of it."""
    parent = Path(out).parent
    new, folder = not parent.exists(), parent / f".{Path(out).name}.{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True)
        yield folder
        for path in sorted(folder.iterdir()):
            os.replace(path, parent / path.name)
    except OSError as e:
        raise UserError(f"cannot write {out}: {e.strerror or e}; choose another --out") from None
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if new and parent.is_dir() and not any(parent.iterdir()):
            parent.rmdir()


def progress(documents, what, total=None):
    """The documents, under a bar that counts their bytes (no bar where the output is no terminal)."""
    with tqdm(total=total, unit="B", unit_scale=True, desc=what, disable=None) as bar:
        for item in documents:
            yield item
            bar.update(n_bytes(item[-1]))


def n_bytes(document):
    return len(document.encode()) if isinstance(document, str) else document.nbytes


def print_summary(cfg, reports, skipped, lone_document):
    for split, r in reports.items():
        print(f"{cfg.out}_{split}: {r['documents']:,} documents, {r['tokens']:,} tokens"
              + (f", {r['bytes_per_token']:.3f} bytes per token" if r["bytes"] else "")
              + f", longest document {r['longest_document']:,} tokens"
              + (f", xz -9: {r['xz_bits_per_byte']:.3f} bits per byte" if "xz_bits_per_byte" in r else ""))
    vocab_size = reports["train"]["vocab_size"]
    print(f"tokenizer: {reports['train']['tokenizer']}, vocab_size {vocab_size}"
          + (f" (the text has no more pairs for {cfg.tokenizer})" if cfg.tokenizer.startswith("bpe:") and
             cfg.tokenizer != f"bpe:{vocab_size}" else ""))
    if lone_document and cfg.val:
        print(f"one document was given: its last part, about {cfg.val:.3g} of it, is the validation split")
    for what, n in skipped.items():
        print(f"left out: {n:,} {what}")
    if not cfg.val and Path(f"{cfg.out}_val.idx").exists():
        print(f"note: {cfg.out}_val is of an earlier run; --val=0 made none")


# ---------------------------------------------------------------------------------------------------------------------
# inspect and vocab

@dataclasses.dataclass
class InspectConfig:
    file: tyro.conf.Positional[str]  # a token file: its prefix, its .bin or its .idx
    tokenizer: str = ""  # to decode with; by default what the sidecar names


def inspect(cfg):
    """Print what a token file holds."""
    data = TokenFile(cfg.file)
    tokenizer = load_tokenizer(cfg.tokenizer) if cfg.tokenizer else data.tokenizer()
    name = cfg.tokenizer or data.meta.get("tokenizer") or f"unknown: there is no {data.prefix}.json; give --tokenizer"
    largest, place = data.largest_id()
    print(f"{data.prefix}: {data.dtype.name}, {len(data):,} documents, {len(data.tokens):,} tokens")
    sizes = data.sizes
    print(f"tokens in a document: {sizes.min():,} to {sizes.max():,}, on average {sizes.mean():,.1f}")
    print(f"largest id: {largest}, at token {place:,}")
    print(f"bytes per token: {data.meta.get('bytes_per_token') or 'unknown'}")
    print(f"tokenizer: {name}" + (f", vocab_size {tokenizer.vocab_size}" if tokenizer else ""))
    for i in range(min(len(data), 3)):
        ids = data.doc(i)[:400].tolist()
        print(f"document {i}: " + (repr(tokenizer.decode(ids)[:200]) if tokenizer else f"ids {ids[:40]}"))


@dataclasses.dataclass
class VocabConfig:
    tokens: tyro.conf.Positional[str]  # a text file with one token per line; lines that begin with # are left out
    out: str = "vocab.txt"  # the vocab file to write


def make_vocab(cfg):
    """A list of tokens -> a vocab file in World's format, ids from 1 in the order of the list."""
    tokens = read_token_list(read_text(cfg.tokens), cfg.tokens)
    with atomic_write(cfg.out) as tmp:
        tmp.write_text("".join(f"{i} {t!r} {len(t.encode())}\n" for i, t in enumerate(tokens, 1)), encoding="utf-8")
    print(f"{cfg.out}: {len(tokens)} tokens, vocab_size {len(tokens) + 1}")


COMMANDS = {"inspect": (InspectConfig, inspect), "vocab": (VocabConfig, make_vocab)}


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    config, command = COMMANDS.get(argv[0] if argv else "", (Config, prepare))
    command(read_flags(config, argv[1:] if argv and argv[0] in COMMANDS else argv))


if __name__ == "__main__":
    main()
