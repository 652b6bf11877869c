"""Tokenizers: text to ids and back.

A tokenizer has encode(str) -> list[int], decode(list[int]) -> str, vocab_size, end_id (the id that
ends a document), name, text (what its file holds, "" if it is built in), save(folder) and, where
there is a fast one, encode_batch(list[str]) -> list[list[int]].
"""

import ast
import re
from pathlib import Path

import pyrwkv_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from gosling.config import UserError
from gosling.files import atomic_write, read_json, read_text

END_TOKENS = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
WORLD_LINE = re.compile(r"(\d+) (b?['\"].*['\"]) (\d+)")  # id, literal, length in bytes


class BaseTokenizer:
    """What both kinds share: their file."""

    def save(self, folder, prefix=""):
        """Write its file to a folder -> what config.json says of it: the file's name, or, of a
        built-in tokenizer, which has no file, its own name."""
        if not self.text:
            return self.name
        with atomic_write(Path(folder) / (prefix + self.file_name)) as tmp:
            tmp.write_bytes(self.text.encode())
        return prefix + self.file_name


class VocabTokenizer(BaseTokenizer):
    """Tokens {id: bytes}; id 0 ends a document.

    Text is cut by greedy longest match on its UTF-8 bytes, or with `words` at white space, every
    word being a token. Text that no token fits is a UserError.
    """

    file_name, end_id = "vocab.txt", 0

    def __init__(self, tokens, name, text="", words=False):
        self.tokens, self.name, self.text, self.words = tokens, name, text, words
        self.ids = {token: i for i, token in tokens.items()}
        self.vocab_size = max(tokens) + 1
        self.lengths = sorted({len(token) for token in self.ids}, reverse=True)

    def encode(self, text):
        if self.words:
            pieces = [word.encode() for word in text.split()]
        else:
            pieces = self.longest_matches(text.encode())
        for n, piece in enumerate(pieces):
            if piece not in self.ids:
                shown = piece.decode("utf-8", "replace")
                raise UserError(f"token {n}, {shown!r}, is not in {self.name}")
        return [self.ids[piece] for piece in pieces]

    def longest_matches(self, data):
        """Cut bytes into tokens; where none fits, the next 12 bytes are a piece of their own."""
        pieces, start = [], 0
        while start < len(data):
            for length in self.lengths:
                if data[start : start + length] in self.ids:
                    break
            else:
                length = 12
            pieces.append(data[start : start + length])
            start += len(pieces[-1])
        return pieces

    def decode(self, ids):
        # Bytes are joined first: a character may lie over two tokens, or be cut. An id that is no
        # token stands for nothing.
        pieces = [self.tokens[i] for i in ids if i in self.tokens]
        separator = b" " if self.words else b""
        return separator.join(pieces).decode("utf-8", "replace")


class HubTokenizer(BaseTokenizer):
    """A Hugging Face tokenizer.json.

    Text stays text: nothing is added around it, and "<|endoftext|>" written in a document is
    encoded letter by letter, not as the document's end.
    """

    file_name = "tokenizer.json"

    def __init__(self, text, source):
        self.text, self.name = text, str(source)
        try:
            self.hub = Tokenizer.from_str(text)
        except Exception as e:  # the library raises a bare Exception
            raise UserError(
                f"{source} is not a Hugging Face tokenizer.json ({str(e)[:120]})"
            ) from None
        self.hub.encode_special_tokens = True
        self.hub.no_padding()
        self.hub.no_truncation()
        end_ids = [self.hub.token_to_id(token) for token in END_TOKENS]
        self.end_id = next((i for i in end_ids if i is not None), None)
        if self.end_id is None:
            raise UserError(
                f"{source} has no token that ends a document; it needs one of "
                + " ".join(END_TOKENS)
            )
        self.vocab_size = max(self.hub.get_vocab(with_added_tokens=True).values()) + 1

    def encode(self, text):
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        encodings = self.hub.encode_batch(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids):
        ids = [i for i in ids if i != self.end_id and 0 <= i < self.vocab_size]
        return self.hub.decode(ids, skip_special_tokens=False)


def train_bpe(texts, size):
    """Byte-level BPE of an iterator of str: <|endoftext|>, 256 bytes, merges up to `size` ids."""
    hub = Tokenizer(models.BPE())
    hub.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    hub.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=["<|endoftext|>"],
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    hub.train_from_iterator(texts, trainer)
    return HubTokenizer(hub.to_str(pretty=True), "the trained tokenizer")


def parse_vocab(text, source):
    """The text of a vocab file -> ({id: bytes}, words).

    Lines are World's, `id literal bytelength`, or a token each, ids from 1. Empty lines and lines
    that begin with # do not count. words: the file is a list of tokens without white space.
    """
    tokens, taken, is_list = {}, set(), None
    # splitlines would also cut at '\x85'
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if not line or line.startswith("#"):
            continue
        where = f"{source}, line {number}"
        if is_list is None:
            is_list = WORLD_LINE.fullmatch(line) is None
        i, token = (len(tokens) + 1, line.encode()) if is_list else parse_world_line(line, where)
        if i < 1 or i in tokens or token in taken:
            raise UserError(f"{where}: id {i} (0 ends a document) or token {token!r} is taken")
        tokens[i] = token
        taken.add(token)
    if not tokens:
        raise UserError(f"{source} holds no tokens; expected one per line")
    words = is_list and len(b"".join(tokens.values()).decode().split()) == 1
    return tokens, words


def parse_world_line(line, where):
    """`id literal bytelength` -> (id, bytes)"""
    found = WORLD_LINE.fullmatch(line)
    try:
        token = ast.literal_eval(found[2])
        token = token.encode() if isinstance(token, str) else token
        if 0 < len(token) == int(found[3]):
            return int(found[1]), token
    except (TypeError, ValueError, SyntaxError):  # TypeError: no match, so that found is None
        pass
    raise UserError(f"{where}: expected `id 'token' bytelength`, got {line[:60]!r}")


def load_tokenizer(name_or_path, folder=""):
    """world, bytes, integers:MAX, a vocab file, a tokenizer.json or a run's folder -> tokenizer.

    folder: where a relative path begins. UserError for a name that is none of these.
    """
    name, path = str(name_or_path), Path(folder, name_or_path)
    if name == "world":
        return world_tokenizer()
    if name == "bytes":  # id = byte + 1, as in World
        tokenizer = VocabTokenizer({i + 1: bytes([i]) for i in range(256)}, name)
        tokenizer.encode = encode_bytes  # the same, faster
        return tokenizer
    if re.fullmatch("integers:[0-9]+", name):  # id = value + 1
        tokens = {i + 1: b"%d" % i for i in range(int(name[9:]) + 1)}
        return VocabTokenizer(tokens, name, words=True)
    if path.is_dir():  # of a run, whose config.json names the tokenizer, or with a file in it
        file = "tokenizer.json" if (path / "tokenizer.json").is_file() else "vocab.txt"
        return load_tokenizer(read_json(path / "config.json").get("tokenizer") or file, path)
    if not path.is_file():
        raise UserError(
            f"tokenizer '{path}': no such name or file; choose world, bytes, integers:MAX "
            "(integers:359), a vocab file, a tokenizer.json, a folder with one, or to prepare data "
            "bpe:SIZE (bpe:4096)"
        )
    text = read_text(path)
    if path.suffix == ".json":
        return HubTokenizer(text, path)
    tokens, words = parse_vocab(text, path)
    if max(tokens) == 65529:  # perhaps World, which has a fast form
        world = world_tokenizer()
        if world.tokens == tokens:
            return world
    return VocabTokenizer(tokens, name, text, words)


def world_tokenizer():
    """World: ids 1..65529 are tokens; the rest of the 65536 is unused."""
    rust = pyrwkv_tokenizer.RWKVTokenizer()  # its decode stops at half a character, ours does not
    tokens, _ = parse_vocab(read_text(rust.vocab_filepath), "world")
    tokenizer = VocabTokenizer(tokens, "world")
    tokenizer.encode, tokenizer.encode_batch = rust.encode, rust.encode_batch
    tokenizer.vocab_size = 65536
    return tokenizer


def encode_bytes(text):
    """The ids of `bytes`."""
    return [byte + 1 for byte in text.encode()]


def tokenizer_of(weights, vocab_size, name="", about=None):
    """The tokenizer of a weights file.

    It is `name` if given, else what `about`, the description of an adapter or a state, says (a name
    or a file beside `weights`), else what config.json beside `weights` says, else World for a model
    of 65536 ids. UserError if none is known, or if it has more ids than the model.
    """
    folder, described = Path(weights).parent, str((about or {}).get("tokenizer", ""))
    if not name and described:
        name = str(folder / described) if (folder / described).is_file() else described
    has_config = (folder / "config.json").is_file()
    if not name and not has_config and vocab_size != 65536:
        raise UserError(
            f"{weights} has a vocabulary of {vocab_size} and no config.json beside it; "
            "say --tokenizer=NAME or FILE"
        )
    tokenizer = load_tokenizer(name or (folder if has_config else "world"))
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, {weights} only {vocab_size}; "
            "use the one it was trained with"
        )
    return tokenizer
