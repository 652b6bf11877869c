"""Tokenizers: text to ids and back.

A tokenizer has encode(str) -> list[int], decode(list[int]) -> str, vocab_size, end_id (the id that
ends a document), name, text (what its file holds, "" if it is built in), digest (of what it does,
the same for every file and name of one tokenizer), save(folder) and, where there is a fast one,
encode_batch(list[str]) -> list[list[int]]. Text that it cannot hold is a UserError.
"""

import ast
import contextlib
import functools
import hashlib
import json
import re
from pathlib import Path

from gosling.config import UserError
from gosling.files import atomic_write, checked, read_json, read_text
from gosling.hub import folder_of
from gosling.schemas import RunConfig

import pyrwkv_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

END_TOKEN = "<|endoftext|>"
END_TOKENS = (END_TOKEN, "</s>", "<eos>", "<|end_of_text|>")
# id, literal, length in bytes
LITERAL = r"""b?(?:'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*")"""
WORLD_LINE = re.compile(rf"([0-9]{{1,9}}) ({LITERAL}) ([0-9]{{1,9}})")
MOST_INTEGERS = 2**20  # the largest MAX of integers:MAX, whose tokens are all held in memory


class BaseTokenizer:
    """What both kinds share: their file, and a digest of `content`, what makes their ids."""

    @functools.cached_property
    def digest(self):
        """Hexadecimal; tokenizers that agree by content have the same one."""
        text = json.dumps(self.content(), sort_keys=True)
        return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()

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

    def content(self):
        tokens = {i: token.hex() for i, token in self.tokens.items()}
        return [tokens, self.words, self.end_id]

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
    encoded letter by letter, not as the document's end. end_token: the token that ends a document,
    in place of the one that the file says or of END_TOKENS; the file then says it when it is saved.
    """

    file_name = "tokenizer.json"

    def __init__(self, text, source, end_token=""):
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
        file = json.loads(text)
        model = file["model"]
        if end_token and end_token != model.get("end_token"):
            model["end_token"] = end_token  # other readers of such files pass over it
            self.text = json.dumps(file, ensure_ascii=False, indent=2)
        self.end_id = self.find_end(model.get("end_token"), source)
        self.unknown_id = model.get("unk_id")  # Unigram says an id, the others a token
        if model.get("unk_token") is not None:
            self.unknown_id = self.hub.token_to_id(model["unk_token"])
        self.holds_all = holds_every_byte(self.hub, file)
        self.vocab_size = max(self.hub.get_vocab(with_added_tokens=True).values()) + 1

    def find_end(self, end_token, source):
        """The id of the token that ends a document."""
        for token in [end_token] if end_token else END_TOKENS:
            if self.hub.token_to_id(token) is not None:
                return self.hub.token_to_id(token)
        if end_token:
            raise UserError(f"end_token={end_token!r} is no token of {source}")
        raise UserError(
            f"{source} has no token that ends a document; it needs one of {' '.join(END_TOKENS)}, "
            "or prepare.py is told another: --end_token=TOKEN"
        )

    def content(self):
        file = json.loads(self.text)
        return [file.get(key) for key in ("added_tokens", "normalizer", "pre_tokenizer", "model")]

    def encode(self, text):
        return self.encode_batch([text])[0]

    def encode_batch(self, texts):
        try:
            encodings = self.hub.encode_batch(texts, add_special_tokens=False)
        except TypeError:
            for text in texts:
                text.encode()  # UnicodeEncodeError for half of a surrogate pair, as others raise it
            raise
        except Exception as e:  # a bare one, where no token stands for what is unknown
            raise UserError(f"{self.name} has no token for a part of the text: {e}") from None
        if not self.holds_all:
            for text, encoding in zip(texts, encodings, strict=True):
                self.check_lost(text, encoding)
        return [encoding.ids for encoding in encodings]

    def check_lost(self, text, encoding):
        """UserError for the first characters that no token, or the unknown one, stands for."""
        lost, end = "", 0
        for i, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True):
            word = text[start:stop]
            if i == self.unknown_id != self.hub.token_to_id(word):
                lost = lost or word
            elif not self.drops(text[end:start]):
                lost = lost or self.first_lost(text)
            end = max(end, stop)
        if not self.drops(text[end:]):
            lost = lost or self.first_lost(text)
        if lost:
            place = text.index(lost)
            around = text[max(place - 20, 0) : place + 20]
            raise UserError(
                f"{self.name} has no token for {lost[:20]!r} (U+{ord(lost[0]):04X}) in {around!r}, "
                "and no bytes to fall back on; use a tokenizer that holds it, such as "
                "--tokenizer=world, or take it out of the text"
            )

    def first_lost(self, text):
        """The first character that is encoded to nothing: offsets behind one are not the text's."""
        for c in text:
            if not self.drops(c) and not self.hub.encode(c, add_special_tokens=False).ids:
                return c
        return ""

    def drops(self, text):
        """Whether it is nothing but white space that keeps words apart, as in a list of words."""
        cut = self.hub.pre_tokenizer
        return not text or (text.isspace() and cut is not None and not cut.pre_tokenize_str(text))

    def decode(self, ids):
        ids = [i for i in ids if i != self.end_id and 0 <= i < self.vocab_size]
        return self.hub.decode(ids, skip_special_tokens=False)


def holds_every_byte(hub, file):
    """Whether a tokenizer.json has a token for every byte, and no step that takes text away."""
    model, steps = file["model"], [file.get("pre_tokenizer") or {}, file.get("normalizer") or {}]
    steps += [step for outer in steps for step in outer.get("pretokenizers", [])]
    steps += [step for outer in steps for step in outer.get("normalizers", [])]
    if any(map(takes_away, steps)):
        return False
    if model.get("byte_fallback"):
        return all(hub.token_to_id(f"<0x{byte:02X}>") is not None for byte in range(256))
    is_byte_level = any(step.get("type") == "ByteLevel" for step in steps)
    if not is_byte_level or model.get("type") not in ("BPE", "Unigram"):
        return False
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    has_prefix = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    return not has_prefix and all(hub.token_to_id(token) is not None for token in alphabet)


def takes_away(step):
    """Whether a normalizer or a pre-tokenizer, as in the file, may leave characters out."""
    removes = step.get("behavior") == "Removed" or step.get("clean_text")
    return bool(removes) or (step.get("type") == "Replace" and step.get("content") == "")


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
    except (TypeError, ValueError, SyntaxError, MemoryError):  # TypeError: found is None
        pass
    raise UserError(f"{where}: expected `id 'token' bytelength`, got {line[:60]!r}")


def load_tokenizer(name_or_path, folder="", end_token=""):
    """world, bytes, integers:MAX, a vocab file, a tokenizer.json or a run's folder -> tokenizer.

    folder: where a relative path begins. end_token: see HubTokenizer. UserError for a name that is
    none of these.
    """
    name, path = str(name_or_path), Path(folder, name_or_path)
    if end_token and path.suffix != ".json":
        raise UserError(
            f"end_token={end_token!r} is for a tokenizer.json; in {name} id 0 ends a document"
        )
    if name == "world":
        return world_tokenizer()
    if name == "bytes":  # id = byte + 1, as in World
        tokenizer = VocabTokenizer({i + 1: bytes([i]) for i in range(256)}, name)
        tokenizer.encode = encode_bytes  # the same, faster
        return tokenizer
    if re.fullmatch("integers:[0-9]+", name):  # id = value + 1
        if len(name) > 20 or int(name[9:]) > MOST_INTEGERS:
            raise UserError(f"tokenizer {name:.60}: integers go up to {MOST_INTEGERS:,}")
        tokens = {i + 1: b"%d" % i for i in range(int(name[9:]) + 1)}
        return VocabTokenizer(tokens, name, words=True)
    if path.is_dir():  # of a run, whose config.json names the tokenizer, or with a file in it
        return tokenizer_in(path)
    if not path.is_file():
        raise UserError(
            f"tokenizer {str(path)!r:.300}: no such name or file; choose world, bytes, "
            "integers:MAX (integers:359), a vocab file, a tokenizer.json, a folder with one, or to "
            "prepare data bpe:SIZE (bpe:4096)"
        )
    text = read_text(path)
    if path.suffix == ".json":
        return HubTokenizer(text, path, end_token)
    tokens, words = parse_vocab(text, path)
    if max(tokens) == 65529:  # perhaps World, which has a fast form
        world = world_tokenizer()
        if world.tokens == tokens:
            return world
    return VocabTokenizer(tokens, name, text, words)


def tokenizer_in(folder):
    """The tokenizer that a folder's config.json names, or whose file lies in it."""
    config = run_config(folder)
    if not config.get("tokenizer"):
        return load_tokenizer(file_in(folder), folder)
    return noted_tokenizer(config, folder / "config.json")


def file_in(folder):
    """The file of a folder that says its tokenizer; a vocab.txt, not the tokenizer.json made of it,
    as tokenizer_config.json of an exported folder says."""
    if not (folder / "tokenizer.json").is_file():
        return "vocab.txt"
    says = read_json(folder / "tokenizer_config.json", object)
    is_made = isinstance(says, dict) and says.get("made_from") == "vocab.txt"
    return "vocab.txt" if is_made else "tokenizer.json"


def run_config(folder):
    """What config.json of a run's folder says; {} of none, and of another program's."""
    config = read_json(folder / "config.json", object)
    is_ours = isinstance(config, dict) and isinstance(config.get("tokenizer"), str)
    return checked(config, RunConfig, folder / "config.json") if is_ours else {}


def noted_tokenizer(note, where):
    """The tokenizer that a JSON file, `where`, names, a file from its folder on; UserError if that
    was changed since."""
    tokenizer = named_in(where, note["tokenizer"], Path(where).parent)
    check_digest(tokenizer, note.get("tokenizer_digest"), where)
    return tokenizer


def named_in(where, name, folder=""):
    """load_tokenizer of a name that stands in a file, `where`, which an error names, too.

    A folder is none, since its config.json might name this one again.
    """
    try:
        if name not in ("world", "bytes") and Path(folder, name).is_dir():
            raise UserError(f"{name!r} is a folder; expected a name or a file in it")
        return load_tokenizer(name, folder)
    except UserError as e:
        raise UserError(f"{where} names a tokenizer: {e}") from e


def check_digest(tokenizer, expected, where):
    """UserError if a tokenizer's file is no longer the one that was noted in `where`."""
    if expected not in (None, tokenizer.digest):
        raise UserError(
            f"{tokenizer.name} is not the tokenizer that {where} was written with; put that one "
            "back, or make the data again"
        )


def agree(tokenizers):
    """UserError unless {what has it: tokenizer} agree by content; None stands for not known."""
    known = [(where, tokenizer) for where, tokenizer in tokenizers.items() if tokenizer]
    for where, tokenizer in known[1:]:
        first, expected = known[0]
        if tokenizer.digest != expected.digest:
            raise UserError(
                f"{where} has the tokenizer {tokenizer.name}, {first} has {expected.name}, which "
                "is another, so that the same ids are other text; prepare the data with the "
                "model's tokenizer, or give the files that belong together"
            )


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


def recorded_tokenizer(weights, vocab_size, name="", about=None):
    """The tokenizer that is recorded with a weights file; None if nothing is.

    `about`, the description of an adapter or a state, names it (a name or a file beside `weights`),
    or config.json in the folder. A bare file of 65536 ids has World. With `name`, another one that
    the user gives, only a record that can be read counts.
    """
    if name:
        with contextlib.suppress(UserError):
            return recorded_tokenizer(weights, 0, about=about)
        return None
    folder, described = folder_of(weights), str((about or {}).get("tokenizer", ""))
    if described:
        file = folder / described
        return named_in(weights, file if file.is_file() else described)
    is_named = run_config(folder).get("tokenizer")
    has_file = any((folder / name).is_file() for name in ("tokenizer.json", "vocab.txt"))
    if is_named or (has_file and (folder / "config.json").is_file()):
        return tokenizer_in(folder)
    return world_tokenizer() if vocab_size == 65536 else None


def tokenizer_of(weights, vocab_size, name="", about=None):
    """The tokenizer of a weights file: `name`, or else the one that is recorded.

    UserError if none is known, if `name` and the record are different tokenizers, or if it has more
    ids than the model.
    """
    if name:
        tokenizer = load_tokenizer(name)
        recorded = recorded_tokenizer(weights, vocab_size, name, about)
        agree({weights: recorded, f"--tokenizer={name}": tokenizer})
    else:
        tokenizer = recorded_tokenizer(weights, vocab_size, about=about)
    if tokenizer is None:
        raise UserError(
            f"{weights} has a vocabulary of {vocab_size} and no config.json beside it that says "
            "its tokenizer; say --tokenizer=NAME or FILE"
        )
    if tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, {weights} only {vocab_size}; "
            "use the one it was trained with"
        )
    return tokenizer
