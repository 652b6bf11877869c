"""Text, JSONL and integers to token files; tokenizers; the chat template.

    python prepare.py INPUT... --out=data/name --tokenizer=world|bytes|integers:359|bpe:4096|FILE --val=0.01
        INPUT: text files, folders (every UTF-8 text file below, hidden ones left out), .jsonl with {"text": "..."}
        lines, hf:DATASET:SPLIT with such rows, .npy integer arrays, or the word stdlib: this Python's standard library.
        A text file is one document; so is a JSONL line, a 1-D array, a row of a 2-D array.
        Writes data/name_train and data/name_val, each .bin .idx .json, and beside them a tokenizer that is a file.
    python prepare.py inspect FILE                        what a token file holds
    python prepare.py vocab TOKENS.txt --out=vocab.txt    a vocab file from a list of tokens, one per line
    python prepare.py show CHATS.jsonl                    a few conversations as they are trained on, the trained part green
    python prepare.py pairs PREFS.jsonl                   preferences: how many, how long, which answer is the longer one

Token files are RWKV-LM's MMIDIDX pair. `.bin`: the tokens back to back, end_id after every document. `.idx`: a header,
int32 sizes [D], int64 byte offsets [D], int64 document numbers [D + 1]. All little-endian. A corpus may be larger than
memory, a document may not.
"""

import ast
import collections
import contextlib
import dataclasses
import itertools
import json
import lzma
import math
import random
import re
import struct
import sys
import sysconfig
import types
import typing
from array import array
from pathlib import Path

import numpy as np
import pyrwkv_tokenizer
import tyro
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm

from common import UserError, atomic_write, print0, read_flags

# ---------------------------------------------------------------------------------------------------------------------
# tokenizers: encode(str) -> list[int], decode(list[int]) -> str, vocab_size, end_id; name; text, to save it, or "" if
# it is built in; encode_batch if there is a fast one


class VocabTokenizer:
    """Tokens {id: bytes}, 0 ends a document. Text is cut by greedy longest match on its UTF-8 bytes; with `words`, at
    white space, every word being a token."""

    file_name, end_id = "vocab.txt", 0

    def __init__(self, tokens, name, text="", words=False):
        self.tokens, self.name, self.text, self.words = tokens, name, text, words
        self.ids, self.vocab_size = {token: i for i, token in tokens.items()}, max(tokens) + 1
        self.lengths = sorted(set(map(len, self.ids)), reverse=True)

    def encode(self, text):
        if self.words:
            pieces = [word.encode() for word in text.split()]
        else:
            data, at, pieces = text.encode(), 0, []
            while at < len(data):
                fits = (piece for n in self.lengths if (piece := data[at : at + n]) in self.ids)
                pieces.append(next(fits, data[at : at + 12]))
                at += len(pieces[-1])
        for n, piece in enumerate(pieces):
            if piece not in self.ids:
                raise UserError(
                    f"token {n}, {piece.decode('utf-8', 'replace')!r}, is not in {self.name}"
                )
        return [self.ids[piece] for piece in pieces]

    def decode(self, ids):
        # Bytes are joined first: a character may lie over two tokens, or be cut. Ids that are no token are nothing.
        pieces = [self.tokens[i] for i in ids if i in self.tokens]
        return (b" " if self.words else b"").join(pieces).decode("utf-8", "replace")


class HubTokenizer:
    """A Hugging Face tokenizer.json. Text stays text: nothing is added around it, and "<|endoftext|>" written in a
    document is encoded letter by letter, not as the document's end."""

    file_name = "tokenizer.json"

    def __init__(self, text, source):
        try:
            self.text, self.name, self.hub = text, str(source), Tokenizer.from_str(text)
        except Exception as e:  # the library raises bare Exception
            raise UserError(
                f"{source} is not a Hugging Face tokenizer.json ({str(e)[:120]})"
            ) from None
        self.hub.encode_special_tokens = True
        self.hub.no_padding()
        self.hub.no_truncation()
        ends = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
        self.end_id = next(
            (i for end in ends if (i := self.hub.token_to_id(end)) is not None), None
        )
        if self.end_id is None:
            raise UserError(
                f"{source} has no token that ends a document; it needs one of {' '.join(ends)}"
            )
        self.vocab_size = max(self.hub.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text):
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        return [encoding.ids for encoding in self.hub.encode_batch(texts, add_special_tokens=False)]

    def decode(self, ids):
        ids = [i for i in ids if i != self.end_id and 0 <= i < self.vocab_size]
        return self.hub.decode(ids, skip_special_tokens=False)


def train_bpe(texts, size):
    """Byte-level BPE from an iterator of str: id 0 = <|endoftext|>, the 256 bytes, then merges up to `size` tokens."""
    hub = Tokenizer(models.BPE())
    hub.pre_tokenizer, hub.decoder = (
        pre_tokenizers.ByteLevel(add_prefix_space=False),
        decoders.ByteLevel(),
    )
    hub.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=["<|endoftext|>"],
            show_progress=False,
            initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        ),
    )
    return HubTokenizer(hub.to_str(pretty=True), "the trained tokenizer")


def parse_vocab(text, source):
    """A vocab file in World's format, `id literal bytelength` lines, or a list with one token per line, ids from 1 ->
    ({id: bytes}, words); words: a list without white space in it. Empty lines and lines with a # first are left out."""
    tokens, seen, is_list = {}, set(), None
    for n, line in enumerate(
        text.replace("\r\n", "\n").split("\n"), 1
    ):  # splitlines would also cut at '\x85'
        if not line or line.startswith("#"):
            continue
        i, token, found = (
            len(tokens) + 1,
            line.encode(),
            re.fullmatch(r"(\d+) (b?['\"].*['\"]) (\d+)", line),
        )
        is_list = not found if is_list is None else is_list
        if not is_list:
            try:
                i, token = int(found[1]), ast.literal_eval(found[2])
                token = token.encode() if isinstance(token, str) else token
                assert 0 < len(token) == int(found[3])
            except (TypeError, ValueError, SyntaxError, AssertionError):
                raise UserError(
                    f"{source}, line {n}: expected `id 'token' bytelength`, got {line[:60]!r}"
                ) from None
        if i < 1 or i in tokens or token in seen:
            raise UserError(
                f"{source}, line {n}: id {i} (0 ends a document) or token {token!r} is taken"
            )
        tokens[i] = token
        seen.add(token)
    if not tokens:
        raise UserError(f"{source} holds no tokens; expected one per line")
    return tokens, is_list and len(b"".join(tokens.values()).decode().split()) == 1


def load_tokenizer(name_or_path, folder=""):
    """world, bytes, integers:MAX, a vocab file, a tokenizer.json, or a run's folder -> tokenizer. folder: where a
    relative path begins."""
    name, path = str(name_or_path), Path(folder, name_or_path)
    if name == "world":  # ids 1..65529 are tokens; the rest of the 65536 is unused
        rust = (
            pyrwkv_tokenizer.RWKVTokenizer()
        )  # its decode stops at half a character, ours does not
        tokenizer = VocabTokenizer(parse_vocab(read_text(rust.vocab_filepath), name)[0], name)
        tokenizer.encode, tokenizer.encode_batch, tokenizer.vocab_size = (
            rust.encode,
            rust.encode_batch,
            65536,
        )
        return tokenizer
    if name == "bytes":  # id = byte + 1, as in World
        tokenizer = VocabTokenizer({i + 1: bytes([i]) for i in range(256)}, name)
        tokenizer.encode = lambda text: [byte + 1 for byte in text.encode()]  # the same, faster
        return tokenizer
    if re.fullmatch("integers:[0-9]+", name):  # id = value + 1
        return VocabTokenizer(
            {i + 1: b"%d" % i for i in range(int(name[9:]) + 1)}, name, words=True
        )
    if (
        path.is_dir()
    ):  # of a run, whose config.json names the tokenizer, or with a tokenizer's file in it
        file = "tokenizer.json" if (path / "tokenizer.json").is_file() else "vocab.txt"
        return load_tokenizer(read_json(path / "config.json").get("tokenizer") or file, path)
    if not path.is_file():
        raise UserError(
            f"tokenizer '{path}': no such name or file; choose world, bytes, integers:MAX (integers:359), "
            "a vocab file, a tokenizer.json, a folder with one, or to prepare data bpe:SIZE (bpe:4096)"
        )
    text = read_text(path)
    if path.suffix == ".json":
        return HubTokenizer(text, path)
    tokens, words = parse_vocab(text, path)
    world = load_tokenizer("world") if max(tokens) == 65529 else None
    return world if world and world.tokens == tokens else VocabTokenizer(tokens, name, text, words)


def save_tokenizer(tokenizer, folder, prefix=""):
    """-> what config.json should say of it: a built-in's name, or the name of the file that this wrote to `folder`."""
    if not tokenizer.text:
        return tokenizer.name
    with atomic_write(Path(folder) / (prefix + tokenizer.file_name)) as tmp:
        tmp.write_bytes(tokenizer.text.encode())
    return prefix + tokenizer.file_name


# ---------------------------------------------------------------------------------------------------------------------
# chat

ROLES = {"system": "System", "user": "User", "assistant": "Assistant"}
THINK = {
    "on": " <think",
    "off": " <think>\n</think",
}  # G1's prefixes; the last bracket is the model's to write


def render_chat(messages, tokenizer, *, generation_prompt=False, last_reply_only=False, think=None):
    """[{"role", "content"}] -> (ids, mask), lists of one length, in the template of RWKV's World and G1 models:
    "System: ...", "User: ...", "Assistant: ..." with a blank line between, end_id after a last reply.

    mask: 1 on the assistant's words and on what ends them (the blank line before a next turn, or end_id), else 0; with
    last_reply_only 1 on the last reply alone. generation_prompt: end in "Assistant:", for the model to go on, and after
    it `think`: "on", "off" or a prefix of your own. Prompts, replies and the blank lines after replies are tokenised
    apart, so that a chat's ids stay a prefix of the longer chat's.
    """
    if not messages or (think is not None and not generation_prompt):
        raise UserError(
            "a chat needs at least one message, and think, how a reply begins, generation_prompt=True"
        )
    parts, prompt = (
        [],
        "",
    )  # (text, learn) pairs, where None as text is the document's end; turns since the last reply
    last_reply = max(
        (n for n, m in enumerate(messages) if m.get("role") == "assistant"), default=None
    )
    for n, message in enumerate(messages):
        role, content = message.get("role"), message.get("content")
        if (
            role not in ROLES
            or not isinstance(content, str)
            or role == "assistant"
            and not content.strip()
        ):
            raise UserError(
                f"message {n}: expected a role of system, user or assistant and a string as content, in a "
                f"reply not an empty one; got role {role!r} and content {content!r:.60}"
            )
        # A turn opens after a blank line and content holds none: "User: " on a line of its own in it is just text.
        content = re.sub(r"\n{2,}", "\n", content.strip())
        if role != "assistant":
            prompt += f"{ROLES[role]}: {content}".rstrip() + "\n\n"
            continue
        learn = n == last_reply or not last_reply_only
        end = None if n == len(messages) - 1 and not generation_prompt else "\n\n"
        parts += [(prompt + "Assistant:", False), (" " + content, learn), (end, learn)]
        prompt = ""
    rest = prompt + "Assistant:" if generation_prompt else prompt.removesuffix("\n\n")
    parts += [(rest, False), (THINK.get(think, think or ""), False)]
    encoded = [
        ([tokenizer.end_id] if text is None else tokenizer.encode(text), learn)
        for text, learn in parts
    ]
    return [i for ids, _ in encoded for i in ids], [
        int(learn) for ids, learn in encoded for _ in ids
    ]


# ---------------------------------------------------------------------------------------------------------------------
# fine-tuning data: conversations -> (ids, mask)

SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
}
SHAPES = (
    '{"messages": [{"role", "content"}]}, {"conversations": [{"from", "value"}]}, {"prompt", "completion"}, '
    '{"text": "..."}, or {"text": [ids], "mask": [0 and 1]}'
)


def render_row(row, tokenizer, last_reply_only=False):
    """One row of fine-tuning data in any of SHAPES -> (ids, mask). UserError says what is wrong with it."""
    text, mask = row.get("text"), row.get("mask")
    if isinstance(text, list):
        if (
            not isinstance(mask, list)
            or len(mask) != len(text)
            or not all(isinstance(i, int) and i >= 0 for i in text)
            or not all(m in (0, 1) for m in mask)
        ):
            raise UserError(
                f'"text" has {len(text)} ids, "mask" {len(mask) if isinstance(mask, list) else "none"}; they '
                "go in pairs, ids >= 0 with 0 or 1"
            )
        return text, [int(m) for m in mask]
    if isinstance(text, str):
        ids = [*tokenizer.encode(text), tokenizer.end_id]
        return ids, [1] * len(ids)
    if isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str):
        prompt, reply = tokenizer.encode(row["prompt"]), tokenizer.encode(row["completion"])
        if not reply:
            raise UserError('"completion" is empty')
        return [*prompt, *reply, tokenizer.end_id], [0] * len(prompt) + [1] * (len(reply) + 1)
    messages = row.get("messages")
    if isinstance(row.get("conversations"), list):
        messages = [
            {"role": SHAREGPT.get(str(m.get("from")), m.get("from")), "content": m.get("value")}
            if isinstance(m, dict)
            else m
            for m in row["conversations"]
        ]
    if not isinstance(messages, list) or not all(
        isinstance(m, dict) and isinstance(m.get("role"), str) for m in messages
    ):
        raise UserError(f"expected {SHAPES}; got the keys {sorted(row)}")
    if not any(m.get("role") == "assistant" for m in messages):
        raise UserError("no assistant turn, so there is nothing to train on")
    return render_chat(messages, tokenizer, last_reply_only=last_reply_only)


def read_hub(name):
    """hf:DATASET:SPLIT or hf:DATASET:SUBSET:SPLIT -> ("name, row i", row) of a Hugging Face dataset or of a folder like one."""
    try:
        import datasets
    except ImportError:
        raise UserError(f"{name}: Hugging Face data needs `pip install datasets`") from None
    dataset, *subset, split = name.removeprefix("hf:").split(":")
    try:
        rows = datasets.load_dataset(dataset or split, *subset, split=split)
    except Exception as e:  # of many kinds: network, names, files
        raise UserError(
            f"{name}: {type(e).__name__}: {str(e)[:200]}; expected hf:DATASET:SPLIT or hf:DATASET:SUBSET:SPLIT, "
            "such as hf:openai/gsm8k:main:train"
        ) from None
    yield from ((f"{name}, row {i}", row) for i, row in enumerate(rows))


def read_jsonl(path, shapes, pick=lambda row: row, skipped=None):
    """("file:line", pick(row)) of each line of a JSONL file of objects; empty lines do not count. Or of a hub's data set, hf:…
    What is wrong with a line, pick's UserError too, is an error with its place, or counted where `skipped` is a Counter."""
    if str(path).startswith("hf:"):
        lines = read_hub(str(path))
    elif Path(path).is_file():
        lines = (
            (f"{path}:{number}", line)
            for number, line in enumerate(open(path, "rb"), 1)
            if line.strip()
        )
    else:
        raise UserError(
            f"{path} does not exist; expected a JSONL file of {shapes}, or hf:DATASET:SPLIT"
        )
    for where, row in lines:
        problem = None
        try:
            row = json.loads(row.decode("utf-8-sig")) if isinstance(row, bytes) else row
            picked = pick(row) if isinstance(row, dict) else None
        except (json.JSONDecodeError, RecursionError) as e:
            problem = f"not JSON ({e}); expected {shapes}"
        except UnicodeError as e:
            problem = f"not UTF-8 text ({e.reason}); expected {shapes}"
        except UserError as e:
            problem = e
        if not isinstance(row, dict):
            problem = problem or f"expected a JSON object: {shapes}"
        if not problem:
            yield where, picked
        elif skipped is None:
            raise UserError(f"{where}: {problem}")
        else:
            skipped["bad JSONL lines"] += 1


def read_examples(path, tokenizer, ctx_len, template=None, last_reply_only=False):
    """A JSONL file of fine-tuning data -> [(ids, mask), …], each at most ctx_len tokens and with a trained target.

    template: a function (row, tokenizer) -> (ids, mask) in place of render_row. What is cut to ctx_len, and what is
    dropped because nothing trained is left, is counted and printed. UserError names file and line.
    """

    def render(row):
        ids, mask = (
            template(row, tokenizer) if template else render_row(row, tokenizer, last_reply_only)
        )
        if len(ids) != len(mask):
            raise UserError(f"the template gave {len(ids)} ids and a mask of {len(mask)}")
        if ids and max(ids) >= tokenizer.vocab_size:
            raise UserError(
                f"id {max(ids)} does not fit the tokenizer's {tokenizer.vocab_size} ids"
            )
        return ids, mask

    rows = [row for _, row in read_jsonl(path, SHAPES, render)]
    # the first token has nothing before it to be predicted from
    examples = [(ids[:ctx_len], mask[:ctx_len]) for ids, mask in rows if any(mask[1:ctx_len])]
    cut, dropped = sum(len(ids) > ctx_len for ids, _ in rows), len(rows) - len(examples)
    if cut or dropped:
        print0(
            f"{path}: {cut} documents cut to ctx_len={ctx_len} tokens, {dropped} dropped with nothing to train on; "
            f"{len(examples)} remain"
        )
    if not examples:
        raise UserError(f"{path} holds nothing to train on")
    return examples


PAIRS = (
    '{"prompt", "chosen", "rejected"} (and "margin"), or {"prompt", "responses": [...], "scores": [...]}; a prompt is '
    "text or messages"
)


class Preference(typing.NamedTuple):
    """Answers to one prompt. Of a pair the first was chosen; `scores` are of K-wise rows, else None."""

    prompt: list  # ids
    answers: list  # K lists of ids, each with what ends it
    scores: list | None  # K numbers
    margin: float = 0.0  # by how much a pair's chosen answer should win


def render_answer(prompt, answer, tokenizer):
    """prompt, text or messages, and one answer, text or messages that end in the assistant's -> (prompt ids, answer ids).
    Prompt and answer are tokenised apart, as they are when the answer is sampled; end_id belongs to the answer. An answer
    that is a whole conversation, as in UltraFeedback, brings its prompt along."""
    if isinstance(answer, list) and answer and isinstance(answer[-1], dict):
        prompt, answer = answer[:-1] or prompt, answer[-1].get("content")
    if not isinstance(answer, str) or not answer.strip():
        raise UserError(f"an answer is empty or no text: {answer!r:.60}")
    if isinstance(prompt, str) and prompt:
        return tokenizer.encode(prompt), [*tokenizer.encode(answer), tokenizer.end_id]
    if not isinstance(prompt, list) or not prompt or not all(isinstance(m, dict) for m in prompt):
        raise UserError(
            f'"prompt" is text or a list of messages, and not empty; got {prompt!r:.60}'
        )
    ids, _ = render_chat([*prompt, {"role": "assistant", "content": answer}], tokenizer)
    start = len(render_chat(prompt, tokenizer, generation_prompt=True)[0])
    return ids[:start], ids[start:]


def read_preferences(path, tokenizer, ctx_len):
    """A JSONL file of PAIRS -> [Preference, …]. What cannot teach is left out, counted and printed: answers that are the
    same text or the same ids, and rows longer than ctx_len (an answer is never cut). UserError names file and line."""

    def render(row):
        answers, scores, margin = row.get("responses"), row.get("scores"), row.get("margin") or 0.0
        if "responses" not in row:
            answers, scores = [row.get("chosen"), row.get("rejected")], None
        elif not (
            isinstance(scores, list)
            and isinstance(answers, list)
            and len(scores) == len(answers) >= 2
            and all(isinstance(x, (int, float)) and math.isfinite(x) for x in scores)
        ):
            raise UserError(
                f'"responses" and "scores" go in pairs, at least two; got {answers!r:.60} and {scores!r:.60}'
            )
        if missing := [
            key
            for key in ("prompt", "chosen", "rejected")
            if key not in row and (scores is None or key == "prompt")
        ]:
            raise UserError(f"{missing[0]!r} is missing; expected {PAIRS}")
        if not isinstance(margin, (int, float)):
            raise UserError(f'expected a number as "margin", got {margin!r:.60}')
        rendered = [render_answer(row["prompt"], answer, tokenizer) for answer in answers]
        prompt, ids = rendered[0][0], [answer for _, answer in rendered]
        if max(map(max, [prompt, *ids])) >= tokenizer.vocab_size:
            raise UserError(f"an id does not fit the tokenizer's {tokenizer.vocab_size}")
        return answers, Preference(prompt, ids, scores, float(margin))

    rows, dropped = [], collections.Counter()
    for _, (answers, row) in read_jsonl(path, PAIRS, render):
        ids, scores = row.answers, row.scores
        if not scores and ids[0] == ids[1]:
            dropped["the same text" if answers[0] == answers[1] else "the same ids"] += 1
        elif scores and len(set(scores)) == 1:
            dropped["scores that are all equal"] += 1
        elif len(row.prompt) + max(map(len, ids)) > ctx_len:
            dropped[f"more than ctx_len={ctx_len} tokens"] += 1
        else:
            rows.append(row)
    if dropped:
        print0(
            f"{path}: dropped "
            + ", ".join(f"{n} rows of {why}" for why, n in dropped.items())
            + f"; {len(rows)} remain"
        )
    if not rows:
        raise UserError(f"{path} holds nothing to train on; expected rows of {PAIRS}")
    return rows


def tokenizer_of(weights, vocab_size, name="", about=None):
    """The tokenizer of a weights file: `name` if given, else what its folder's config.json says, else World if the model
    has 65536 ids. UserError if none is known, or if it has more ids than the model. about: what the file of an adapter or a
    state says of itself, perhaps the tokenizer's name or its file, from there."""
    folder, says = Path(weights).parent, str((about or {}).get("tokenizer", ""))
    if not name and says:
        name = str(folder / says) if (folder / says).is_file() else says
    if not name and not (folder / "config.json").is_file() and vocab_size != 65536:
        raise UserError(
            f"{weights} has a vocabulary of {vocab_size} and no config.json beside it; "
            "say --tokenizer=NAME or FILE"
        )
    tokenizer = load_tokenizer(name or (folder if (folder / "config.json").is_file() else "world"))
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, {weights} only {vocab_size}; "
            "use the one it was trained with"
        )
    return tokenizer


# ---------------------------------------------------------------------------------------------------------------------
# token files

MAGIC, HEADER = (
    b"MMIDIDX\x00\x00",
    struct.Struct("<9sQBQQ"),
)  # magic, version, dtype code, documents, documents + 1
# RWKV-LM's codes; its 6 and 7 are floats. 9 is ours: it has no uint32, and refuses a code that it does not know.
DTYPES = {1: "<u1", 2: "<i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2", 9: "<u4"}


class TokenFile:
    """Reads `prefix`.bin and .idx by memory map ('x', 'x.bin' or 'x.idx'). tokens [N]: the whole .bin, end tokens
    included; sizes [D]; doc(i): the tokens of document i; len(): D; meta: the sidecar `prefix`.json, or {}."""

    def __init__(self, prefix):
        self.prefix = re.sub(r"\.(bin|idx)$", "", str(prefix))
        binary, index, sidecar = (Path(f"{self.prefix}.{end}") for end in ("bin", "idx", "json"))

        def check(good, problem):
            if not good:
                raise UserError(f"{problem}; prepare the data again, or copy both files again")

        for path in (binary, index):
            check(path.is_file(), f"{path} does not exist; a token file is {binary} and {index}")
        head = np.fromfile(index, np.uint8, HEADER.size).tobytes()
        magic, version, code, n, m = HEADER.unpack(head.ljust(HEADER.size, b"\0"))
        check(
            magic == MAGIC and version == 1,
            f"{index} does not begin with MMIDIDX and version 1, as RWKV-LM's do",
        )
        check(
            code in DTYPES,
            f"{index}: dtype code {code} is no integer type, expected one such as 8 (uint16)",
        )
        size, expected = index.stat().st_size, HEADER.size + 12 * n + 8 * m
        check(
            size == expected and n,
            f"{index} is cut off or damaged: {size} bytes, expected {expected}",
        )
        self.dtype = np.dtype(DTYPES[code])
        self.sizes = np.memmap(index, "<i4", "r", HEADER.size, n)
        self.offsets = np.memmap(index, "<i8", "r", HEADER.size + 4 * n, n)  # in bytes
        size, expected = (
            binary.stat().st_size,
            int(self.sizes.sum(dtype=np.int64)) * self.dtype.itemsize,
        )
        check(
            size == expected > 0,
            f"{binary} is cut off, or not of this index: {size} bytes, expected {expected}",
        )
        self.tokens, self.meta = np.memmap(binary, self.dtype, "r"), read_json(sidecar)

    def __len__(self):
        return len(self.sizes)

    def doc(self, i):
        """The tokens of document i, its end token included: a view [sizes[i]] of the .bin."""
        start = int(self.offsets[i]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.sizes[i])]

    def tokenizer(self):
        """The tokenizer that the sidecar names; None if there is no sidecar."""
        return (
            load_tokenizer(self.meta["tokenizer"], Path(self.prefix).parent)
            if "tokenizer" in self.meta
            else None
        )

    def check_vocab(self, vocab_size):
        """UserError if an id is not below vocab_size, with the largest one and where it is. Every token is read, unless
        the dtype or the sidecar already says that all of them fit."""
        if min(self.meta.get("vocab_size", math.inf), np.iinfo(self.dtype).max + 1) <= vocab_size:
            return
        for at in (int(self.tokens.argmin()), int(self.tokens.argmax())):
            if not 0 <= self.tokens[at] < vocab_size:
                document = int(np.searchsorted(self.offsets, at * self.dtype.itemsize, "right")) - 1
                raise UserError(
                    f"{self.prefix}.bin: id {self.tokens[at]} at token {at} (document {document}) does not "
                    f"fit vocab_size {vocab_size}; prepare the data with the model's tokenizer"
                )


@contextlib.contextmanager
def TokenFileWriter(prefix, dtype):
    """`with TokenFileWriter(prefix, np.uint16) as f: f.add(ids)`, a call a document, its end token included. At the end
    .bin and .idx get their names; an exception on the way leaves neither."""
    dtype, sizes = np.dtype(dtype).newbyteorder("<"), array("i")

    def add(ids):
        ids, limit = np.asarray(ids), np.iinfo(dtype).max
        if (
            len(ids) and not 0 <= ids.min() <= ids.max() <= limit
        ):  # a cast would wrap around and say nothing
            raise UserError(
                f"{prefix}: an id among {ids.min()}..{ids.max()} is outside 0..{limit} of {dtype}"
            )
        f.write(ids.astype(dtype).tobytes())
        sizes.append(len(ids))

    with atomic_write(f"{prefix}.idx") as index, atomic_write(f"{prefix}.bin") as binary:
        with open(binary, "wb") as f:
            yield types.SimpleNamespace(add=add, sizes=sizes, flush=f.flush)
        n, lengths, code = (
            len(sizes),
            np.array(sizes, "<i4"),
            {np.dtype(t): c for c, t in DTYPES.items()}[dtype],
        )
        offsets = (np.cumsum(lengths, dtype="<i8") - lengths) * dtype.itemsize
        index.write_bytes(
            HEADER.pack(MAGIC, 1, code, n, n + 1)
            + lengths.tobytes()
            + offsets.tobytes()
            + np.arange(n + 1, dtype="<i8").tobytes()
        )


# ---------------------------------------------------------------------------------------------------------------------
# the command: what the user gives, to token files


def read_text(path, errors="strict"):
    """A UTF-8 file -> str, its line ends as they are, without a byte order mark."""
    try:
        return Path(path).read_bytes().decode("utf-8-sig", errors)
    except OSError as e:
        raise UserError(f"{path} cannot be read: {e.strerror}") from None
    except UnicodeDecodeError as e:
        raise UserError(
            f"{path} is not UTF-8 text (byte {e.start} is 0x{e.object[e.start]:02x}); convert it"
        ) from None


def read_json(path):
    """A JSON file -> its value; {} if there is no such file."""
    try:
        return json.loads(read_text(path)) if path.is_file() else {}
    except ValueError:
        raise UserError(f"{path} is not JSON; mend or remove it") from None


def list_files(inputs):
    """-> [(path, named)]. A file that the user named must be text; one that a folder brought may be left out."""
    files = []
    for word in inputs:
        stdlib = (
            word == "stdlib"
        )  # without tests, what is installed, and a table of generated documentation
        root = Path(sysconfig.get_path("stdlib") if stdlib else word)
        if word.startswith("hf:"):
            files.append((root, True))
            continue
        skip = {"site-packages", "dist-packages", "test", "tests", "pydoc_data"} if stdlib else ()
        if not root.exists():
            raise UserError(
                f"{word} does not exist; INPUT is text files, folders, .jsonl, hf:DATASET:SPLIT, .npy, or the word "
                "stdlib"
            )
        for path in [root] if root.is_file() else sorted(root.rglob("*.py" if stdlib else "*")):
            if path.is_file() and not any(
                p[0] == "." or p in skip for p in path.relative_to(root).parts
            ):
                files.append((path, path == root))
    return files


def read_documents(files, skip_bad, skipped):
    """Yield (where, text) of every document. skipped: Counter of what was left out."""
    for path, named in files:
        try:
            for where, text in read_file(path, named, skipped, skipped if skip_bad else None):
                if text:
                    yield where, text
                else:
                    skipped["empty documents"] += 1
        except (OSError, ValueError) as e:  # ValueError: of np.load
            raise UserError(f"{path} cannot be read: {e}") from None


def read_file(path, named, skipped, skipped_lines):
    shape = '{"text": "..."}; mend it, or leave such lines out with --skip_bad'

    def text_of(row):
        if not isinstance(row.get("text"), str):
            raise UserError(f"got {row!r:.60}, expected {shape}")
        row["text"].encode()  # fails for half of a surrogate pair
        return row["text"]

    if str(path).startswith("hf:") or path.suffix == ".jsonl":
        yield from read_jsonl(path, shape, text_of, skipped_lines)
    elif path.suffix == ".npy":
        for number, row in enumerate(
            np.atleast_2d(np.load(path, mmap_mode="r", allow_pickle=False))
        ):
            yield f"{path}, row {number}", " ".join(map(str, row.tolist()))
    else:
        text = read_text(path, "strict" if named else "surrogateescape")
        if not named and re.search(
            "[\0\udc80-\udcff]", text
        ):  # a NUL: some binary files are valid UTF-8
            skipped["files that are not UTF-8 text"] += 1
        else:
            yield str(path), text


@dataclasses.dataclass
class Config:
    inputs: tyro.conf.Positional[
        tuple[str, ...]
    ]  # text files, folders, .jsonl, .npy, or the word stdlib
    out: str  # prefix of what is written: data/name gives data/name_train.bin and so on
    tokenizer: str = "world"  # world, bytes, integers:MAX, bpe:SIZE (trained here), a vocab file or a tokenizer.json
    val: float = (
        0.01  # part of the documents that goes to validation, at least one; 0: no validation file
    )
    seed: int = 0  # which documents those are
    skip_bad: bool = False  # leave out and count JSONL lines that cannot be read, instead of stopping at the first


def split_documents(cfg, files, skipped):
    """Reads everything once, to choose by seed and sizes what validates -> a function that reads it again and yields
    ("train" or "val", where, text) of every document. A single document is cut in two."""
    first = tqdm(
        read_documents(files, cfg.skip_bad, skipped), "reading", unit=" documents", disable=None
    )
    sizes = np.fromiter((len(text) for _, text in first), np.int64)
    # A document larger than half of what validation should have in all is passed over, where that leaves enough.
    n_val = (
        min(max(round(len(sizes) * cfg.val), 1), len(sizes) - 1) if cfg.val and len(sizes) else 0
    )
    pool = np.flatnonzero(sizes <= cfg.val * sizes.sum() / 2)
    pool = pool if len(pool) >= n_val else np.arange(len(sizes))
    chosen = set(pool[random.Random(cfg.seed).sample(range(len(pool)), n_val)].tolist())

    def documents(what):
        again = read_documents(files, cfg.skip_bad, collections.Counter())
        for i, (where, text) in enumerate(
            tqdm(again, what, len(sizes), unit=" documents", disable=None)
        ):
            if len(sizes) > 1 or not cfg.val:
                yield "val" if i in chosen else "train", where, text
            else:  # its last part, from a line on, or else a word
                aim = min(max(round(len(text) * (1 - cfg.val)), 1), len(text) - 1)
                cut = (
                    text.rfind("\n", aim // 2, aim) + 1 or text.rfind(" ", aim // 2, aim) + 1 or aim
                )
                yield "train", where, text[:cut]
                yield "val", where, text[cut:]

    if not len(sizes):
        raise UserError(f"no documents in {' '.join(cfg.inputs) or 'no INPUT'}{left_out(skipped)}")
    return documents


def left_out(skipped):
    return "".join(f"; left out {n:,} {what}" for what, n in skipped.items())


def prepare(cfg):
    """Inputs -> token files. The input is read twice, three times with bpe:SIZE; of documents no longer in hand only
    the sizes are kept. After an error the old files are as they were."""
    if not 0 <= cfg.val < 1:
        raise UserError(
            f"--val={cfg.val}: expected a part from 0 (no validation) to below 1, such as 0.01"
        )
    kind, _, bpe_size = cfg.tokenizer.partition(":")
    if kind == "bpe" and not (bpe_size.isdecimal() and int(bpe_size) >= 257):
        raise UserError(
            f"--tokenizer={cfg.tokenizer}: expected bpe:SIZE, SIZE >= 257 (the end token and 256 bytes)"
        )
    tokenizer = None if kind == "bpe" else load_tokenizer(cfg.tokenizer)
    files, skipped = list_files(cfg.inputs), collections.Counter()
    for path, _ in files:
        if path.suffix == ".npy" and kind != "integers":
            raise UserError(
                f"{path}: integer arrays need --tokenizer=integers:MAX, MAX being their largest value"
            )
    documents = split_documents(cfg, files, skipped)
    if kind == "bpe":
        texts = (
            text for split, _, text in documents(f"training {cfg.tokenizer}") if split == "train"
        )
        tokenizer = train_bpe(texts, int(bpe_size))

    out, splits = Path(cfg.out), ("train", "val") if cfg.val else ("train",)
    dtype = np.uint16 if tokenizer.vocab_size <= 65536 else np.uint32
    text_bytes, val_text = dict.fromkeys(splits, 0), bytearray()
    todo, fast = (
        documents("encoding"),
        getattr(tokenizer, "encode_batch", None),
    )  # fast: on all cores
    with contextlib.ExitStack() as stack:
        writers = {
            split: stack.enter_context(TokenFileWriter(f"{out}_{split}", dtype)) for split in splits
        }
        while batch := list(itertools.islice(todo, 32 if fast else 1)):
            try:
                encoded = (
                    fast([text for _, _, text in batch])
                    if fast
                    else [tokenizer.encode(batch[0][2])]
                )
            except UserError as e:
                raise UserError(f"{batch[0][1]}: {e}") from None
            for (split, _, text), ids in zip(batch, encoded):
                writers[split].add(ids + [tokenizer.end_id])
                text_bytes[split] += len(text.encode())
                if (
                    split == "val" and text_bytes["val"] <= 1 << 26
                ):  # to run xz -9 on, for comparison
                    val_text += text.encode()
        for writer in writers.values():
            writer.flush()  # a full disk shows here, while the old sidecars still stand
        for split in (
            "train",
            "val",
        ):  # the sidecar of an earlier run would not fit the new tokenizer
            Path(f"{out}_{split}.json").unlink(missing_ok=True)
    entry = save_tokenizer(tokenizer, out.parent, prefix=f"{out.name}.")  # the sidecars come last
    for split in splits:
        lengths, size, n = writers[split].sizes, text_bytes[split], sum(writers[split].sizes)
        report = {
            "tokenizer": entry,
            "vocab_size": tokenizer.vocab_size,
            "documents": len(lengths),
            "tokens": n,
            "bytes": size,
            "bytes_per_token": size / n,
            "longest_document": max(lengths),
        }
        if split == "val" and size <= 1 << 26:
            report["xz_bits_per_byte"] = 8 * len(lzma.compress(val_text, preset=9)) / size
        with atomic_write(f"{out}_{split}.json") as tmp:
            tmp.write_text(json.dumps(report, indent=1) + "\n")
        print(
            f"{out}_{split}: {len(lengths):,} documents, {n:,} tokens, {size / n:.3f} bytes per token"
        )
    print(f"tokenizer: {entry}, vocab_size {tokenizer.vocab_size}{left_out(skipped)}")


@dataclasses.dataclass
class InspectConfig:
    file: tyro.conf.Positional[str]  # a token file: its prefix, its .bin or its .idx
    tokenizer: str = ""  # to decode with; by default what the sidecar names


def inspect(cfg):
    """Print what a token file holds."""
    data = TokenFile(cfg.file)
    tokenizer, sizes = (
        load_tokenizer(cfg.tokenizer) if cfg.tokenizer else data.tokenizer(),
        data.sizes,
    )
    print(
        f"{data.prefix}: {data.dtype.name}, {len(data):,} documents, {len(data.tokens):,} tokens; in a document "
        f"{sizes.min():,} to {sizes.max():,}, on average {sizes.mean():,.1f}"
    )
    print(f"largest id: {data.tokens.max()}, at token {data.tokens.argmax():,}")
    print(f"sidecar: {json.dumps(data.meta) if data.meta else 'none; --tokenizer=NAME shows text'}")
    for i in range(min(len(data), 3)):
        ids = data.doc(i)[:400].tolist()
        print(
            f"document {i}: "
            + (repr(tokenizer.decode(ids)[:200]) if tokenizer else f"ids {ids[:40]}")
        )


@dataclasses.dataclass
class VocabConfig:
    tokens: tyro.conf.Positional[
        str
    ]  # a text file with one token per line; lines that begin with # are left out
    out: str = "vocab.txt"  # the vocab file to write


def make_vocab(cfg):
    """A list of tokens -> a vocab file in World's format, ids from 1 in the order of the list."""
    tokens, _ = parse_vocab(read_text(cfg.tokens), cfg.tokens)
    with atomic_write(cfg.out) as tmp:
        tmp.write_bytes(
            "".join(f"{i} {t.decode()!r} {len(t)}\n" for i, t in tokens.items()).encode()
        )
    print(f"{cfg.out}: {len(tokens)} tokens, vocab_size {len(tokens) + 1}")


@dataclasses.dataclass
class PairsConfig:
    file: tyro.conf.Positional[
        str
    ]  # a JSONL file, of conversations for show, of preferences for pairs
    tokenizer: str = "world"  # name or file
    ctx_len: int = 4096  # as in training, longer conversations are cut, longer preferences dropped


@dataclasses.dataclass
class ShowConfig(PairsConfig):
    n: int = 3  # examples to print
    last_reply_only: bool = False  # train on each conversation's last reply alone


def show(cfg):
    """Print a few rendered examples, what is trained in green, what is only read in grey."""
    tokenizer = load_tokenizer(cfg.tokenizer)
    examples = read_examples(cfg.file, tokenizer, cfg.ctx_len, last_reply_only=cfg.last_reply_only)
    for number, (ids, mask) in enumerate(examples[: cfg.n], 1):
        print(f"--- {number}: {len(ids)} tokens, {sum(mask[1:])} trained")
        for learn, run in itertools.groupby(zip(ids, mask), key=lambda pair: pair[1]):
            part = [i for i, _ in run]
            ended = part[-1] == tokenizer.end_id
            text = tokenizer.decode(part[:-1] if ended else part) + "<end>" * ended
            print(f"\033[{32 if learn else 90}m{text}\033[0m", end="")
        print()
    print(
        f"{len(examples)} documents, {sum(sum(m[1:]) for _, m in examples):,} of "
        f"{sum(len(i) for i, _ in examples):,} tokens trained"
    )


def pairs(cfg):
    """Read preferences as training would, and print what they are."""
    rows = read_preferences(cfg.file, load_tokenizer(cfg.tokenizer), cfg.ctx_len)
    mean = lambda lengths: f"{sum(lengths) / len(lengths):,.1f}"  # noqa: E731
    prompts, answers = [len(r.prompt) for r in rows], [len(a) for r in rows for a in r.answers]
    two = [r for r in rows if not r.scores]
    print(
        f"{cfg.file}: {len(two):,} pairs, {len(rows) - len(two):,} rows of scored answers; prompts {mean(prompts)} tokens on "
        f"average, the longest {max(prompts):,}; answers {mean(answers)}, the longest {max(answers):,}"
    )
    if two:
        chosen, rejected = zip(*(map(len, r.answers) for r in two))
        print(
            f"chosen {mean(chosen)} tokens, rejected {mean(rejected)}; the longer one is the chosen one in "
            f"{sum(a > b for a, b in zip(chosen, rejected)) / len(two):.1%}, equally long "
            f"{sum(a == b for a, b in zip(chosen, rejected)) / len(two):.1%}"
        )


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "inspect": (InspectConfig, inspect),
        "vocab": (VocabConfig, make_vocab),
        "show": (ShowConfig, show),
        "pairs": (PairsConfig, pairs),
    }
    config, command = commands.get(" ".join(argv[:1]), (Config, prepare))
    command(read_flags(config, argv[command is not prepare :]))


if __name__ == "__main__":
    main()
