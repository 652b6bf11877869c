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
from gosling import config, engine
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
WORDS = [
    "river",
    "green",
    "naïve",
    "東京",
    "ship",
    "café",
    "twelve",
    "Ωmega",
    "stone",
    "quick",
    "雪",
    "paper",
]


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


# ----------------------------------------------------------------------------------------------
# each library: tokens -> a tokenizer; that -> a grammar; that -> (mask(), accept(id)) of a text


def llguidance_steps(tokens, end_id):
    from gosling.grammar import Vocabulary

    from llguidance import LLMatcher, LLTokenizer

    def compile_schema(tokenizer):
        grammar = LLMatcher(tokenizer, LLMatcher.grammar_from_json_schema(SCHEMA))
        assert not grammar.is_error(), grammar.get_error()
        return grammar

    def begin(grammar):
        matcher = grammar.deep_copy()
        return matcher.compute_bitmask, matcher.consume_token

    return (
        lambda: LLTokenizer(Vocabulary(tokens, end_id), n_vocab=len(tokens)),
        compile_schema,
        begin,
    )


def xgrammar_steps(tokens, end_id):
    import xgrammar

    mask = xgrammar.allocate_token_bitmask(1, len(tokens))

    def build():
        info = xgrammar.TokenizerInfo(
            tokens, xgrammar.VocabType.RAW, vocab_size=len(tokens), stop_token_ids=[end_id]
        )
        return xgrammar.GrammarCompiler(info, max_threads=1)

    def begin(grammar):
        matcher = xgrammar.GrammarMatcher(grammar)
        return lambda: matcher.fill_next_token_bitmask(mask), matcher.accept_token

    return build, lambda compiler: compiler.compile_json_schema(json.dumps(SCHEMA)), begin


def outlines_steps(tokens, end_id):
    import outlines_core
    from outlines_core.json_schema import build_regex_from_schema

    global G_mask
    mask = G_mask = np.zeros((len(tokens) + 31) // 32, np.int32)

    def build():
        ids = {}
        for i, token in enumerate(tokens):
            if token:
                ids.setdefault(token, []).append(i)
        return outlines_core.Vocabulary(end_id, ids)

    def begin(index):
        guide = outlines_core.Guide(index)
        write = (mask.ctypes.data, mask.size, 4)
        return lambda: guide.write_mask_into(*write), lambda i: guide.advance(i, False)

    return (
        build,
        lambda v: outlines_core.Index(build_regex_from_schema(json.dumps(SCHEMA)), v),
        begin,
    )


def measure(cfg, name, steps):
    """Follow the tokens of valid documents through a library; every mask is timed."""
    tokenizer = load_tokenizer("world")
    tokens = [tokenizer.tokens.get(i, b"") for i in range(tokenizer.vocab_size)]
    build, compile_schema, begin = steps(tokens, tokenizer.end_id)
    start = time.perf_counter()
    built = build()
    built_at = time.perf_counter()
    grammar = compile_schema(built)
    compiled_at, seconds = time.perf_counter(), []
    for text in documents(cfg.documents):
        mask, accept = begin(grammar)
        for token in tokenizer.encode(text):
            before = time.perf_counter()
            mask()
            seconds.append(time.perf_counter() - before)
            assert accept(token) is not False, (name, text)
    micro = np.array(seconds) * 1e6
    timer.report(
        "grammar",
        library=name,
        tokenizer_ms=round((built_at - start) * 1e3, 1),
        schema_ms=round((compiled_at - built_at) * 1e3, 1),
        masks=len(micro),
        mask_us=round(float(micro.mean()), 1),
        mask_p99_us=round(float(np.percentile(micro, 99)), 1),
        mask_most_us=round(float(micro.max()), 1),
    )


def libraries(cfg):
    sides = {"llguidance": llguidance_steps, "xgrammar": xgrammar_steps}
    for name, steps in {**sides, "outlines_core": outlines_steps}.items():
        try:
            __import__(name)
        except ImportError as e:
            print(f"{name}: {e}", file=sys.stderr)
            continue
        measure(cfg, name, steps)


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
    libraries(cfg) if cfg.part == "libraries" else engine_cost(cfg)


if __name__ == "__main__":
    main(config.read_flags(Config))
