"""Structured output: which tokens may come next, so that a completion fits a JSON schema or a
regular expression.

A Grammar belongs to a request, a Matcher to each of its completions. llguidance follows the text
byte by byte; a token may come if the text with it can still become one that fits, however the text
is cut into tokens, and an id that ends a completion where the text fits as it is. JSON is written
compact, with single spaces or with indented lines: never a blank line, which would end a turn.

    pip install llguidance

V vocabulary, B completions. Bits are a byte for eight tokens, the first token the lowest bit.
"""

import functools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

from gosling.config import UserError, warn
from gosling.files import read_text
from gosling.vocab_json import letters_of_bytes

import numpy as np
import torch
from torch.nn.functional import embedding

LARGEST = 2**18  # characters of a schema or of a regular expression
SECONDS = 5  # of a CPU, for llguidance to read one; some short ones would take it hours
ANY_OBJECT = {"type": "object"}  # the schema of OpenAI's json_object
WHITE_SPACE = r" |\n {0,40}"  # between the parts of a JSON text, or nothing
ASCII = "dws"  # \d, \w and \s mean ASCII, as with Python's re.ASCII
TAIL = 64  # tokens at a prompt's end that tell how it ends
# What a reply begins with before its text, by how its prompt ends (see chat.THINK): whether it
# thinks first, up to </think>, and the characters that follow.
LEADS = {
    "Assistant: <think": (True, "\n"),
    "Assistant: <think>\n</think": (False, ">\n"),
    "Assistant:": (False, " "),
}
# What each byte of bits adds to its eight logits, [256, 8]. On a CPU this is several times as fast
# as masked_fill, for whose branches a mask of half the vocabulary is the worst case.
BITS = np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], 1, bitorder="little")
ADDED = torch.zeros(256, 8).masked_fill(torch.from_numpy(BITS) == 0, -math.inf)
# What reads a grammar on trial, in a process that the system stops after so many seconds of a CPU,
# or else its parent does after some more. It is told where llguidance lies.
TRIAL = """import sys
sys.path.insert(0, sys.argv[1])
try:
    import resource
    most = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(sys.argv[2]), most))
except (ImportError, ValueError):  # on Windows, or limited already
    pass
from llguidance import LLMatcher, LLTokenizer
text = sys.stdin.buffer.read().decode()
LLMatcher(LLTokenizer("byte"), text, log_level=0).compute_bitmask()
"""
# Tokens may cut the text in any way, not in the tokenizer's own alone.
HEAD = """%llguidance {"no_forcing": true}
thoughts[suffix="</think>"]: />(?s:.)*/
"""


def library():
    """The module llguidance."""
    try:
        import llguidance
    except ImportError:
        raise UserError("json_schema and regex need `pip install llguidance`") from None
    return llguidance


def read_schema(path):
    """The JSON schema in a file -> dict; None of no path."""
    if not path:
        return None
    try:
        schema = json.loads(read_text(path))
    except (ValueError, RecursionError) as e:
        raise UserError(f"json_schema={path} is not JSON ({e}); expected a JSON schema") from None
    if not isinstance(schema, dict):
        raise UserError(
            f"json_schema={path}: expected an object such as {json.dumps(ANY_OBJECT)}, got "
            f"{schema!r:.60}"
        )
    return schema


# ----------------------------------------------------------------------------------------------
# vocabularies


class Vocabulary:
    """What llguidance asks of a tokenizer. tokens: bytes of each id; empty ones are no text."""

    is_tokenizer_wrapper, bos_token_id = True, None

    def __init__(self, tokens, end_id):
        self.tokens, self.eos_token_id, self.special_token_ids = list(tokens), end_id, [end_id]
        self.tokens[end_id] = b"\xff<end>"  # 0xFF, which no text has, begins a special token

    def __call__(self, text):
        """Text to ids, which a grammar does not need that forces no way to write its text."""
        return []


def token_bytes(tokenizer):
    """-> the bytes of each id, which are put end to end; empty where an id is no text"""
    if getattr(tokenizer, "words", False):
        raise UserError(
            f"json_schema and regex: the tokenizer {tokenizer.name} has words, with blanks between "
            "that are no tokens; expected one whose tokens are put end to end, such as world"
        )
    if not hasattr(tokenizer, "hub"):
        return [tokenizer.tokens.get(i, b"") for i in range(tokenizer.vocab_size)]
    file = json.loads(tokenizer.text)
    decoder = file.get("decoder") or {}
    kinds = {step["type"] for step in decoder.get("decoders", [decoder]) if "type" in step}
    if kinds != {"ByteLevel"}:
        raise UserError(
            f"json_schema and regex: {tokenizer.name} writes tokens in another way than as bytes "
            f"(its decoder is {', '.join(sorted(kinds)) or 'none'}); expected ByteLevel"
        )
    bytes_of = {letter: byte for byte, letter in letters_of_bytes().items()}
    tokens = [b""] * tokenizer.vocab_size
    for token, i in tokenizer.hub.get_vocab(with_added_tokens=False).items():
        if all(letter in bytes_of for letter in token):
            tokens[i] = bytes(bytes_of[letter] for letter in token)
    for i, added in tokenizer.hub.get_added_tokens_decoder().items():
        tokens[i] = b"" if added.special else added.content.encode()
    return tokens


@functools.lru_cache(maxsize=4)
def readable(tokenizer):
    """A tokenizer as llguidance reads it, and keeps it: World takes a tenth of a second."""
    tokens = token_bytes(tokenizer)
    return library().LLTokenizer(Vocabulary(tokens, tokenizer.end_id), n_vocab=len(tokens))


# ----------------------------------------------------------------------------------------------
# grammars


def lead_of(prompt_ids, tokenizer):
    """-> (whether a reply to this prompt thinks first, the characters before its text)"""
    end = tokenizer.decode(prompt_ids[-TAIL:])
    return next((lead for prompt, lead in LEADS.items() if end.endswith(prompt)), (False, ""))


def rules(json_schema, regex, thinks=False, lead=""):
    """The grammar of a reply, in llguidance's form of Lark's syntax."""
    first = "thoughts " if thinks else ""
    if regex is not None:
        pattern = f"{lead}(?:{regex})" if lead else regex
        return f"{HEAD}start: {first}/{library().regex_to_lark(pattern, ASCII)}/\n"
    first += json.dumps(lead) if lead else "/ ?/"
    guidance = {"whitespace_pattern": WHITE_SPACE, **json_schema.get("x-guidance", {})}
    text = json.dumps({**json_schema, "x-guidance": guidance})
    return f"{HEAD}start: {first} json\njson: %json {text}\n"


def check_size(o):
    """UserError for a schema that is not JSON, or for one or a regex that is out of all bounds."""
    if o.json_schema is not None and o.regex is not None:
        raise UserError("json_schema and regex: a completion fits one of them; leave one out")
    text, what = o.regex, "regex"
    if o.json_schema is not None:
        what = "json_schema"
        try:
            text = json.dumps(o.json_schema, allow_nan=False)
        except (TypeError, ValueError, RecursionError) as e:
            raise UserError(f"json_schema: it cannot be written as JSON ({e})") from None
        if not isinstance(o.json_schema.get("x-guidance", {}), dict):
            raise UserError("json_schema: x-guidance, llguidance's own options, are no object")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"regex={text!a:.60}: half of a character is in it, take it out") from None
    if not text:
        raise UserError("regex='' fits no text but the empty one; leave it out")
    if len(text) > LARGEST:
        raise UserError(f"{what}: {len(text):,} characters; at most {LARGEST:,} are read")


def in_words(error):
    """What llguidance says is wrong, in one line."""
    error = re.split(r"\n +\d+ \| |\n<", error)[0]
    error = re.sub(r"^at \d+\(\d+\): |failed to compile JSON schema: ", "", error)
    return " ".join(error.split("\nerror: ")[-1].split())[:200]


def grammar_of(o, prompts, vocab_size):
    """The Grammar of a request's options, or None where any text will do."""
    if o.json_schema is None and o.regex is None:
        return None
    check_size(o)
    if o.tokenizer is None:
        raise UserError("json_schema and regex need the tokenizer; give it")
    return Grammar(o, prompts, vocab_size)


@functools.lru_cache(maxsize=256)
def trial(text):
    """Whether llguidance reads a grammar, for better or worse, in time and without falling over."""
    place = str(Path(library().__file__).parent.parent)
    command = [sys.executable, "-I", "-S", "-c", TRIAL, place, str(SECONDS)]
    options = dict(input=text.encode(), capture_output=True, timeout=6 * SECONDS)
    try:
        done = subprocess.run(command, **options)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0


class Grammar:
    """What all completions of a request must fit, each behind its prompt."""

    def __init__(self, o, prompts, vocab_size):
        self.what = "regex" if o.regex is not None else "json_schema"
        stop = np.zeros(vocab_size, bool)
        stop[sorted(o.stop_ids)] = True
        ruled_out = np.zeros(vocab_size, bool)
        ruled_out[[i for i, bias in o.logit_bias.items() if bias == -math.inf]] = True
        ruled_out[readable(o.tokenizer).vocab_size :] = True
        self.end_id, self.warned = o.tokenizer.end_id, False
        self.stop = np.packbits(stop & ~ruled_out, bitorder="little")
        stop[self.end_id] = True  # is no text, even where it ends nothing
        self.text = np.packbits(~(ruled_out | stop), bitorder="little")
        if not trial(rules(o.json_schema, o.regex)):
            raise UserError(
                f"{self.what}: llguidance is not done with it after {SECONDS} seconds, or fails; "
                "make it simpler"
            )
        self.leads = [lead_of(ids, o.tokenizer) for ids in prompts]
        self.begins = {}
        for lead in [(False, ""), *self.leads]:  # the first says what is wrong with the regex alone
            if lead not in self.begins:
                self.begins[lead] = self.compile(o, lead)

    def compile(self, o, lead):
        """A Matcher at the beginning; UserError for what is no schema or no regex."""
        limits = library().LLParserLimits(verbose_errors=False)
        follower = library().LLMatcher(
            readable(o.tokenizer), rules(o.json_schema, o.regex, *lead), log_level=0, limits=limits
        )
        if follower.is_error():
            shown = "" if o.regex is None else f"={o.regex!r:.60}"
            raise UserError(f"{self.what}{shown}: {in_words(follower.get_error())}")
        matcher = Matcher(self, follower)
        if not matcher.allowed.any():
            raise UserError(f"{self.what}: no token of {o.tokenizer.name} begins a text that fits")
        return matcher

    def begin(self, p):
        """The Matcher of a completion of prompt p."""
        begin = self.begins[self.leads[p]]
        return Matcher(self, begin.follower.deep_copy(), begin.allowed)


class Matcher:
    """Where a completion stands in its grammar. allowed: bits of the tokens that may come next."""

    def __init__(self, grammar, follower, allowed=None):
        self.grammar, self.follower, self.allowed = grammar, follower, allowed
        if allowed is None:
            self.look()

    def look(self):
        """Find out what is allowed -> (whether the text can go on, whether it may end here)"""
        g = self.grammar
        bits = np.frombuffer(self.follower.compute_bitmask(), np.uint8)
        may_end = self.follower.is_accepting()
        self.allowed = np.zeros_like(g.text)
        n = min(len(bits), len(g.text))
        self.allowed[:n] = bits[:n] & g.text[:n]
        can_go_on = bool(self.allowed.any())
        if may_end:
            self.allowed |= g.stop
        return can_go_on, may_end

    def accept(self, token, is_last):
        """Another token of the text -> "stop" or "length" if it was the last one, else None

        "stop": the text fits and cannot go on, and no id may end it, or no token is left for one.
        """
        self.follower.consume_token(token)
        can_go_on, may_end = self.look()
        if may_end and not can_go_on and (is_last or not self.allowed.any()):
            return "stop"
        if is_last:
            return "length"
        if not self.allowed.any():
            self.say_why()
            return "length"
        return None

    def say_why(self):
        """A warning, the first time, that a text does not fit yet and cannot go on."""
        if not self.grammar.warned:
            why = in_words(self.follower.get_error()) or "no token fits that is not ruled out"
            warn(f"{self.grammar.what}: a completion cannot go on, {why}; it ends unfinished")
        self.grammar.warned = True


def bits_of(matchers, vocab_size):
    """-> bits of the tokens that each row allows, [B, V / 8]; all where its Matcher is None"""
    bits = np.full((len(matchers), -(-vocab_size // 8)), 255, np.uint8)
    for row, matcher in enumerate(matchers):
        if matcher is not None:
            bits[row] = matcher.allowed
    return bits


def masked(logits, bits, added=ADDED):
    """logits [B, V], bits [B, V / 8] -> the logits, -inf where the bits are 0

    added: ADDED, where the logits are.
    """
    return embedding(bits.int(), added).flatten(1)[:, : logits.shape[1]] + logits
