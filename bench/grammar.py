"""Structured output: libraries that make token masks, and what a grammar costs the engine.

python bench/grammar.py --part=libraries   # llguidance, xgrammar, outlines_core, where installed
python bench/grammar.py --part=engine      # generation with a schema to generation without; CPU
"""

import json
import random
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gosling import config, engine, grammar
from gosling.tokenizer import load_tokenizer
from model import RWKV, RWKVConfig

import timer

SCHEMA = {  # strings, numbers, an enum and a list, all bounded
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 40},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "score": {"type": "number"},
        "kind": {"enum": ["person", "firm", "größer"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 12}, "maxItems": 5},
    },
    "required": ["name", "age", "score", "kind", "tags"],
    "additionalProperties": False,
}
WORDS = ["river", "green", "naïve", "東京", "ship", "café", "Ωmega", "stone", "雪", "paper"]


@dataclass
class Config:
    part: Literal["libraries", "engine"] = "engine"  # what is measured
    documents: int = 100  # libraries: documents of the schema whose tokens are followed
    n_layer: int = 12  # engine: layers
    n_embd: int = 768  # engine: width
    slots: int = 16  # engine: sequences at a time
    tokens: int = 32  # engine: new tokens of each
    rounds: int = 5  # engine: counted runs of each side
    threads: int = 1  # CPU threads


def documents(n):
    """n documents of the schema, as json.dumps writes them: one space behind each colon."""
    r, texts = random.Random(0), []
    for _ in range(n):
        name = " ".join(r.choices(WORDS, k=4))
        tags = r.choices(WORDS, k=r.randint(0, 5))
        kind = r.choice(SCHEMA["properties"]["kind"]["enum"])
        document = {"name": name, "age": r.randint(0, 150), "score": round(r.uniform(-9, 9), 3)}
        texts.append(json.dumps({**document, "kind": kind, "tags": tags}, ensure_ascii=False))
    return texts


def fits(text):
    """Whether a text is JSON of SCHEMA."""
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return (
        sorted(value) == sorted(SCHEMA["properties"])
        and len(value["name"]) <= 40
        and isinstance(value["age"], int)
        and 0 <= value["age"] <= 150
        and value["kind"] in SCHEMA["properties"]["kind"]["enum"]
        and len(value["tags"]) <= 5
        and all(len(tag) <= 12 for tag in value["tags"])
    )


# ----------------------------------------------------------------------------------------------
# Each library in three steps: the bytes of each id and the end id -> build() a tokenizer,
# compile(it) -> a grammar, begin(that) -> (mask(), which gives bits as bytes, and accept(id)).


class Llguidance:
    def __init__(self, tokens, end_id):
        import llguidance

        self.library, self.tokens, self.end_id = llguidance, tokens, end_id

    def build(self):
        vocabulary = grammar.Vocabulary(self.tokens, self.end_id)
        return self.library.LLTokenizer(vocabulary, n_vocab=len(self.tokens))

    def compile(self, tokenizer):
        compiled = self.library.LLMatcher(tokenizer, grammar.rules(SCHEMA, None))
        assert not compiled.is_error(), compiled.get_error()
        return compiled

    def begin(self, compiled):
        matcher = compiled.deep_copy()
        return matcher.compute_bitmask, matcher.consume_token


class Xgrammar:
    def __init__(self, tokens, end_id):
        import xgrammar

        self.library, self.tokens, self.end_id = xgrammar, tokens, end_id
        self.bits = xgrammar.allocate_token_bitmask(1, len(tokens))

    def build(self):
        raw = self.library.VocabType.RAW
        info = self.library.TokenizerInfo(self.tokens, raw, stop_token_ids=[self.end_id])
        return self.library.GrammarCompiler(info, max_threads=1)

    def compile(self, compiler):
        return compiler.compile_json_schema(json.dumps(SCHEMA))

    def begin(self, compiled):
        matcher = self.library.GrammarMatcher(compiled)

        def mask():
            matcher.fill_next_token_bitmask(self.bits)
            return self.bits.numpy().tobytes()

        return mask, matcher.accept_token


class OutlinesCore:
    def __init__(self, tokens, end_id):
        import outlines_core
        import outlines_core.json_schema

        self.library, self.tokens, self.end_id = outlines_core, tokens, end_id
        self.bits = np.zeros((len(tokens) + 31) // 32, np.int32)

    def build(self):
        ids = {}
        for i, token in enumerate(self.tokens):
            if token:
                ids.setdefault(token, []).append(i)
        return self.library.Vocabulary(self.end_id, ids)

    def compile(self, vocabulary):
        regex = self.library.json_schema.build_regex_from_schema(json.dumps(SCHEMA))
        return self.library.Index(regex, vocabulary)

    def begin(self, index):
        guide = self.library.Guide(index)

        def mask():
            guide.write_mask_into(self.bits.ctypes.data, self.bits.size, self.bits.itemsize)
            return self.bits.tobytes()

        return mask, lambda token: guide.advance(token, return_tokens=False)


def follow(begin, compiled, texts, tokenizer):
    """Seconds of every mask on the way through texts that fit."""
    seconds = []
    for text in texts:
        mask, accept = begin(compiled)
        for token in tokenizer.encode(text):
            start = time.process_time()
            mask()
            seconds.append(time.process_time() - start)
            assert accept(token) is not False, text
    return np.array(seconds)


def random_text(begin, compiled, tokens, end_id, random):
    """Tokens drawn from the masks, seldom blanks -> what they make; None if it has no end."""
    mask, accept = begin(compiled)
    chosen = []
    while len(chosen) < 400:
        bits = np.frombuffer(mask(), np.uint8)
        allowed = np.flatnonzero(np.unpackbits(bits, count=len(tokens), bitorder="little"))
        drawn = random.choice(allowed, 20)
        token = next((int(i) for i in drawn if not tokens[i].isspace()), int(drawn[0]))
        if token == end_id:
            return b"".join(chosen).decode("utf-8", "replace")
        chosen.append(tokens[token])
        accept(token)
    return None


def measure(cfg, name, kind):
    tokenizer = load_tokenizer("world")
    tokens = [tokenizer.tokens.get(i, b"") for i in range(tokenizer.vocab_size)]
    end_id, clock = tokenizer.end_id, time.process_time
    times = [clock()]
    library = kind(tokens, end_id)
    times.append(clock())
    built = library.build()
    times.append(clock())
    compiled = library.compile(built)
    times.append(clock())
    micro = 1e6 * follow(library.begin, compiled, documents(cfg.documents), tokenizer)
    random = np.random.default_rng(0)
    texts = [
        random_text(library.begin, compiled, tokens, end_id, random) for _ in range(cfg.documents)
    ]
    ended = [text for text in texts if text is not None]
    milliseconds = [round(1e3 * s, 1) for s in np.diff(times)]
    timer.report(
        "grammar",
        library=name,
        **dict(zip(("import_ms", "tokenizer_ms", "schema_ms"), milliseconds, strict=True)),
        masks=len(micro),
        mask_us=round(float(micro.mean()), 1),
        mask_p99_us=round(float(np.percentile(micro, 99)), 1),
        random_texts=len(ended),
        of_which_fit=sum(map(fits, ended)),
    )


def libraries(cfg):
    kinds = {"llguidance": Llguidance, "xgrammar": Xgrammar, "outlines_core": OutlinesCore}
    for name, kind in kinds.items():
        try:
            measure(cfg, name, kind)
        except ImportError as e:
            print(f"{name}: {e}", file=sys.stderr)


def engine_cost(cfg):
    """Tokens per second with a schema to those without, as many tokens on both sides."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer("world")
    model = RWKV(RWKVConfig("x070", cfg.n_layer, cfg.n_embd, tokenizer.vocab_size)).eval()
    # Lists of strings without an end, so that no sample is done before the last token.
    schema = {"type": "array", "items": {"type": "string"}, "minItems": 1000}
    options = dict(
        n=cfg.slots, max_new_tokens=cfg.tokens, tokenizer=tokenizer, seed=0, progress=False
    )
    prompt = [tokenizer.encode("A list of names:\n")]

    def sample(**more):
        completions = engine.generate(model, prompt, **options, **more)
        assert all(len(c.tokens) == cfg.tokens for c in completions)

    sides = {
        "with": lambda: sample(json_schema=schema),
        "without": lambda: sample(stop_ids=[]),
    }
    seconds = timer.interleaved(sides, cfg.rounds)
    timer.report(
        "grammar",
        what="generate with a schema / without",
        n_layer=cfg.n_layer,
        n_embd=cfg.n_embd,
        slots=cfg.slots,
        tokens=cfg.tokens,
        ratio=timer.median(seconds["without"] / seconds["with"], 3),
    )


def main(cfg):
    torch.set_num_threads(cfg.threads)
    if cfg.part == "libraries":
        libraries(cfg)
    else:
        engine_cost(cfg)


if __name__ == "__main__":
    main(config.read_flags(Config))
