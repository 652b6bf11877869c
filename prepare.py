"""Text, JSONL and integers to token files, and a look at data as training sees it.

python prepare.py INPUT... --out=data/name --tokenizer=NAME --val=0.01
    INPUT: text files, folders (every UTF-8 text file below, hidden ones left out), .jsonl and
    .ndjson with {"text": "..."} lines, .json arrays of such rows, each also as .gz, .parquet and
    hf:DATASET:SPLIT with a column "text", .npy integer arrays, or the word stdlib: this Python's
    standard library. A text file is one document; so is a row, or a 1-D array. In a folder a .json
    file is text.
    NAME: world, bytes, integers:359, bpe:4096 (trained here), or a file.
    Writes data/name_train and data/name_val, each .bin .idx .json, and beside them a tokenizer
    that is a file.
python prepare.py inspect FILE          what a token file holds
python prepare.py show CHATS.jsonl      a few conversations, what is trained in green
python prepare.py pairs PREFS.jsonl     a few preferences, green and red; which answer is longer
"""

import collections
import contextlib
import itertools
import json
import lzma
import random
import re
import sys
import sysconfig
from dataclasses import dataclass
from pathlib import Path

from gosling.config import Decay, Seed, UserError, read_flags
from gosling.data import read_examples, read_jsonl, read_preferences
from gosling.data import render_chat as render_chat  # DESIGN.md: importable from here
from gosling.files import first_line, read_text, write_json
from gosling.rows import holds_rows
from gosling.token_files import TokenFile, TokenFileWriter
from gosling.tokenizer import load_tokenizer, train_bpe

import numpy as np
import tyro
from pydantic import PositiveInt
from tqdm import tqdm

XZ_BYTES = 1 << 26  # of validation text, for `xz -9` to compare a model's bits per byte with


@dataclass
class Config:
    inputs: tyro.conf.Positional[tuple[str, ...]]  # text files, folders, .jsonl, .npy, or stdlib
    out: str  # prefix of what is written: data/name gives data/name_train.bin and so on
    tokenizer: str = "world"  # world, bytes, integers:MAX, bpe:SIZE, a vocab file, tokenizer.json
    end_token: str = ""  # of a tokenizer.json: the token that ends a document; empty = as it says
    val: Decay = 0.01  # share of the documents for validation, at least one; 0: no such file
    seed: Seed = 0  # which documents those are
    skip_bad: bool = False  # leave out and count JSONL lines that cannot be read


# ----------------------------------------------------------------------------------------------
# what the user gives, to documents


def list_files(inputs):
    """-> [(path, named)]. named: the user's word itself, and not a file found in a folder."""
    files = []
    for word in inputs:
        root, skipped_folders = Path(word), set()
        if word.startswith("hf:"):
            files.append((root, True))
            continue
        if word == "stdlib":  # without tests, what is installed, and generated documentation
            root = Path(sysconfig.get_path("stdlib"))
            skipped_folders = {"site-packages", "dist-packages", "test", "tests", "pydoc_data"}
        if not root.exists():
            raise UserError(
                f"{word} does not exist; INPUT is text files, folders, .jsonl, hf:DATASET:SPLIT, "
                ".npy, or the word stdlib"
            )
        if root.is_file():
            files.append((root, True))
            continue
        for path in sorted(root.rglob("*.py" if word == "stdlib" else "*")):
            names = path.relative_to(root).parts
            is_hidden = any(name[0] == "." or name in skipped_folders for name in names)
            if path.is_file() and not is_hidden:
                files.append((path, False))
    return files


def read_documents(files, skip_bad, skipped):
    """(where, text) of every document. skipped: Counter of what is left out."""
    for path, named in files:
        try:
            for where, text in read_file(path, named, skip_bad, skipped):
                if text:
                    yield where, text
                else:
                    skipped["empty documents"] += 1
        except OSError as e:
            raise UserError(f"{path} cannot be read: {e}") from None


def read_file(path, named, skip_bad, skipped):
    """(where, text) of every document of one file."""
    is_json = re.search(r"\.json(\.gz)?$", path.name, re.IGNORECASE)
    if holds_rows(path) and (named or not is_json):
        shape = '{"text": "..."}; mend it, or leave such lines out with --skip_bad'

        def text_of(row):
            if not isinstance(row.get("text"), str):
                raise UserError(f"got {row!r:.60}, expected {shape}")
            row["text"].encode()  # fails for half of a surrogate pair
            return row["text"]

        yield from read_jsonl(path, shape, text_of, skipped if skip_bad else None)
    elif path.suffix == ".npy":
        rows = np.atleast_2d(read_array(path))
        for number, row in enumerate(rows):
            yield f"{path}, row {number}", " ".join(map(str, row.tolist()))
    else:
        text = read_text(path, "strict" if named else "surrogateescape")
        # A file that the user named must be text. A NUL: some binary files are valid UTF-8.
        if not named and re.search("[\0\udc80-\udcff]", text):
            skipped["files that are not UTF-8 text"] += 1
        else:
            yield str(path), text


def read_array(path):
    """A .npy file, by memory map."""
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as e:  # of many kinds: its header is read as Python
        raise UserError(
            f"{path} cannot be read: {first_line(e)}; save one with numpy.save"
        ) from None
    if not isinstance(array, np.ndarray):
        raise UserError(f"{path} cannot be read: it is no .npy file; save one with numpy.save")
    return array


def choose_validation(cfg, files, skipped):
    """Read everything once -> (number of documents, the numbers of those that validate).

    cfg.seed chooses. A document larger than half of what validation should have in all is passed
    over, where that leaves enough.
    """
    documents = read_documents(files, cfg.skip_bad, skipped)
    documents = tqdm(documents, "reading", unit=" documents", disable=None)
    sizes = np.fromiter((len(text) for _, text in documents), np.int64)
    if not len(sizes):
        inputs = " ".join(cfg.inputs) or "no INPUT"
        raise UserError(f"no documents in {inputs}{left_out(skipped)}")
    if not cfg.val:
        return len(sizes), set()
    n_val = min(max(round(len(sizes) * cfg.val), 1), len(sizes) - 1)
    pool = np.flatnonzero(sizes <= cfg.val * sizes.sum() / 2)
    if len(pool) < n_val:
        pool = np.arange(len(sizes))
    chosen = random.Random(cfg.seed).sample(range(len(pool)), n_val)
    return len(sizes), set(pool[chosen].tolist())


def split_documents(cfg, files, n_documents, chosen, what):
    """Read everything again: ("train" or "val", where, text) of every document."""
    documents = read_documents(files, cfg.skip_bad, collections.Counter())
    documents = tqdm(documents, what, n_documents, unit=" documents", disable=None)
    for number, (where, text) in enumerate(documents):
        if n_documents == 1 and cfg.val:
            head, tail = cut_in_two(text, cfg.val)
            yield "train", where, head
            yield "val", where, tail
        else:
            yield "val" if number in chosen else "train", where, text


def cut_in_two(text, val):
    """A single document -> its first part, and its last, about `val` of it.

    The last part begins with a line, or else a word, unless the nearest border is far away.
    """
    aim = min(max(round(len(text) * (1 - val)), 1), len(text) - 1)
    line, word = (text.rfind(border, aim // 2, aim) + 1 for border in "\n ")
    cut = line or word or aim
    return text[:cut], text[cut:]


def left_out(skipped):
    return "".join(f"; left out {n:,} {what}" for what, n in skipped.items())


# ----------------------------------------------------------------------------------------------
# documents to token files


def encode_at(where, text, tokenizer):
    """Text -> ids; what the tokenizer cannot hold is an error that says where it stands."""
    try:
        return tokenizer.encode(text)
    except UserError as e:
        raise UserError(f"{where}: {e}") from None


def encode_documents(documents, tokenizer):
    """(split, where, text) -> (split, text, ids), on all cores where the tokenizer can."""
    if not hasattr(tokenizer, "encode_batch"):
        for split, where, text in documents:
            yield split, text, encode_at(where, text, tokenizer)
        return
    while batch := list(itertools.islice(documents, 32)):
        try:
            encoded = tokenizer.encode_batch([text for _, _, text in batch])
        except UserError:  # it does not say in which of them
            encoded = [encode_at(where, text, tokenizer) for _, where, text in batch]
        for (split, _, text), ids in zip(batch, encoded, strict=True):
            yield split, text, ids


def write_token_files(out, splits, documents, tokenizer):
    """Write .bin and .idx of each split -> {split: its numbers, for the sidecar}."""
    dtype = np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32
    n_bytes, val_text = dict.fromkeys(splits, 0), bytearray()
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(TokenFileWriter(f"{out}_{split}", dtype)) for split in splits
        }
        for split, text, ids in encode_documents(documents, tokenizer):
            writers[split].add(ids + [tokenizer.end_id])
            n_bytes[split] += len(text.encode())
            if split == "val" and n_bytes["val"] <= XZ_BYTES:
                val_text += text.encode()
        for writer in writers.values():
            writer.file.flush()  # a full disk shows here, while the old sidecars still stand
        for split in ("train", "val"):  # an earlier run's would not fit the new tokenizer
            Path(f"{out}_{split}.json").unlink(missing_ok=True)
    reports = {}
    for split, writer in writers.items():
        reports[split] = {
            "documents": len(writer.sizes),
            "tokens": sum(writer.sizes),
            "bytes": n_bytes[split],
            "bytes_per_token": n_bytes[split] / sum(writer.sizes),
            "longest_document": max(writer.sizes),
        }
    if "val" in splits and n_bytes["val"] <= XZ_BYTES:
        n_compressed = len(lzma.compress(val_text, preset=9))
        reports["val"]["xz_bits_per_byte"] = 8 * n_compressed / n_bytes["val"]
    return reports


def prepare(cfg):
    """Inputs -> token files, their sidecars and the tokenizer.

    The input is read twice, three times with bpe:SIZE; of documents no longer in hand only the
    sizes are held. After an error the old files are as they were.
    """
    kind, _, bpe_size = cfg.tokenizer.partition(":")
    if kind == "bpe" and not (bpe_size.isdecimal() and int(bpe_size) >= 257):
        expected = "expected bpe:SIZE, SIZE >= 257 for 256 bytes and the end token"
        raise UserError(f"--tokenizer={cfg.tokenizer}: {expected}")
    tokenizer = None if kind == "bpe" else load_tokenizer(cfg.tokenizer, end_token=cfg.end_token)
    if kind == "bpe" and cfg.end_token:
        raise UserError(f"--end_token={cfg.end_token}: bpe is trained with an end of its own")
    files, skipped = list_files(cfg.inputs), collections.Counter()
    for path, _ in files:
        if path.suffix == ".npy" and kind != "integers":
            raise UserError(f"{path}: integer arrays need --tokenizer=integers:MAX, their maximum")
    n_documents, chosen = choose_validation(cfg, files, skipped)
    if kind == "bpe":
        documents = split_documents(cfg, files, n_documents, chosen, f"training {cfg.tokenizer}")
        texts = (text for split, _, text in documents if split == "train")
        tokenizer = train_bpe(texts, int(bpe_size))
    out, splits = Path(cfg.out), ("train", "val") if cfg.val else ("train",)
    documents = split_documents(cfg, files, n_documents, chosen, "encoding")
    reports = write_token_files(out, splits, documents, tokenizer)
    name = tokenizer.save(out.parent, prefix=f"{out.name}.")  # the sidecars come last
    for split, report in reports.items():
        about = {"tokenizer": name, "tokenizer_digest": tokenizer.digest}
        about["vocab_size"] = tokenizer.vocab_size
        write_json(f"{out}_{split}.json", about | report)
        print(
            f"{out}_{split}: {report['documents']:,} documents, {report['tokens']:,} tokens, "
            f"{report['bytes_per_token']:.3f} bytes per token"
        )
    print(f"tokenizer: {name}, vocab_size {tokenizer.vocab_size}{left_out(skipped)}")


# ----------------------------------------------------------------------------------------------
# a look at data


@dataclass
class InspectConfig:
    file: tyro.conf.Positional[str]  # a token file: its prefix, its .bin or its .idx
    tokenizer: str = ""  # to decode with; by default what the sidecar names


def inspect(cfg):
    """Print what a token file holds."""
    data = TokenFile(cfg.file)
    tokenizer = load_tokenizer(cfg.tokenizer) if cfg.tokenizer else data.tokenizer()
    sizes = data.sizes
    print(
        f"{data.prefix}: {data.dtype.name}, {len(data):,} documents, {len(data.tokens):,} tokens; "
        f"in a document {sizes.min():,} to {sizes.max():,}, on average {sizes.mean():,.1f}"
    )
    print(f"largest id: {data.tokens.max()}, at token {data.tokens.argmax():,}")
    sidecar = json.dumps(data.meta) if data.meta else "none; --tokenizer=NAME shows text"
    print(f"sidecar: {sidecar}")
    for i in range(min(len(data), 3)):
        ids = data.doc(i)[:400].tolist()
        shown = repr(tokenizer.decode(ids)[:200]) if tokenizer else f"ids {ids[:40]}"
        print(f"document {i}: {shown}")


@dataclass
class PairsConfig:
    file: tyro.conf.Positional[str]  # JSONL: conversations for show, preferences for pairs
    tokenizer: str = "world"  # name or file
    ctx_len: PositiveInt = 4096  # as in training: longer chats are cut, longer pairs dropped
    n: PositiveInt = 3  # examples to print
    skip_bad: bool = False  # leave out and count rows that cannot be read


@dataclass
class ShowConfig(PairsConfig):
    last_reply_only: bool = False  # train on each conversation's last reply alone


def coloured(ids, tokenizer, colour):
    """Text in an ANSI colour, with the document's end as "<end>"."""
    end = ids[-1:] == [tokenizer.end_id]
    text = tokenizer.decode(ids[:-1]) + "<end>" if end else tokenizer.decode(ids)
    return f"\033[{colour}m{text}\033[0m"


def show(cfg):
    """Print a few rendered examples, what is trained in green, what is only read in grey."""
    tokenizer = load_tokenizer(cfg.tokenizer)
    reading = dict(last_reply_only=cfg.last_reply_only, skip_bad=cfg.skip_bad)
    examples = read_examples(cfg.file, tokenizer, cfg.ctx_len, **reading)
    for number, (ids, mask) in enumerate(examples[: cfg.n], 1):
        print(f"--- {number}: {len(ids)} tokens, {sum(mask[1:])} trained")
        start = 0
        for trained, group in itertools.groupby(mask):
            end = start + len(list(group))
            print(coloured(ids[start:end], tokenizer, 32 if trained else 90), end="")
            start = end
        print()
    for form, n in examples.formats.items():
        print(f"{n:,} rows of {' and '.join(form.keys)}: trained is {form.trained}")
    n_trained = sum(sum(mask[1:]) for _, mask in examples)
    n_tokens = sum(len(ids) for ids, _ in examples)
    print(f"{len(examples)} documents, {n_trained:,} of {n_tokens:,} tokens trained")


def pairs(cfg):
    """Read preferences as training would; print a few, a pair's better answer in green and its
    worse one in red, and what they are."""
    tokenizer = load_tokenizer(cfg.tokenizer)
    rows = read_preferences(cfg.file, tokenizer, cfg.ctx_len, cfg.skip_bad)
    for number, row in enumerate(rows[: cfg.n], 1):
        print(f"--- {number}: {len(row.prompt)} tokens, margin {row.margin:g}")
        print(coloured(row.prompt, tokenizer, 90))
        marks = row.scores or ("chosen", "rejected")
        colours = [33] * len(marks) if row.scores else [32, 31]  # scored answers in yellow
        for mark, ids, colour in zip(marks, row.answers, colours, strict=True):
            print(f"{mark}, {len(ids)} tokens:{coloured(ids, tokenizer, colour)}")
    prompts = [len(row.prompt) for row in rows]
    answers = [len(ids) for row in rows for ids in row.answers]
    lengths = np.array([[len(ids) for ids in row.answers] for row in rows if not row.scores])
    print(
        f"{cfg.file}: {len(lengths):,} pairs, {len(rows) - len(lengths):,} rows of scored answers; "
        f"prompts {np.mean(prompts):,.1f} tokens on average, the longest {max(prompts):,}; "
        f"answers {np.mean(answers):,.1f}, the longest {max(answers):,}"
    )
    if len(lengths):
        chosen, rejected = lengths.T
        print(
            f"chosen {chosen.mean():,.1f} tokens, rejected {rejected.mean():,.1f}; the longer one "
            f"is the chosen one in {np.mean(chosen > rejected):.1%}, equally long "
            f"{np.mean(chosen == rejected):.1%}"
        )


def main(argv=None):
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["inspect"]:
        inspect(read_flags(InspectConfig, words[1:]))
    elif words[:1] == ["show"]:
        show(read_flags(ShowConfig, words[1:]))
    elif words[:1] == ["pairs"]:
        pairs(read_flags(PairsConfig, words[1:]))
    else:
        prepare(read_flags(Config, words))


if __name__ == "__main__":
    main()
