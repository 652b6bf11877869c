"""Text from a model: continue a prompt, several prompts at once, or chat.

    python sample.py --model=out/pretrain_tiny/rwkv-final.pth --prompt="def "
    python sample.py --model=RWKV-x070-World-0.1B.pth --chat
    python sample.py --model=... --prompts=prompts.txt --n=4 --temperature=0.8 --top_p=0.9
    python sample.py --state=none --state=out/state/state-final.pth --prompt="..."      base against tuned state
    python sample.py --model=... --prompt="a long text" --save_state=cache.pth          then --state=cache.pth goes on

One constant-size state per sequence; a prompt is read once and forked into its n samples. `generate` below is the engine
that everything else uses too. No compiler is needed, and a CPU is enough.
"""
import contextlib
import json
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

import common
import prepare
from common import UserError
from model import RWKV, read_state, write_state

PREFILL = 4096  # prompt tokens read at a time: bounds the memory of long and of many prompts


@dataclass
class Config:
    model: str = ""              # weights, .pth or .safetensors; empty = the one that the state was tuned on
    prompt: str = ""             # text to continue
    prompts: str = ""            # file with a prompt a line, or .jsonl with {"prompt": …} lines
    chat: bool = False           # talk: a turn a line, an empty line or Ctrl-D ends
    system: str = ""             # chat: a system turn to begin with
    state: tyro.conf.UseAppendAction[tuple[str, ...]] = ()  # tuned state; repeated: side by side; "none" is one too
    save_state: str = ""         # keep the state after the prompt in this file, and stop
    n: int = 1                   # samples of each prompt
    max_new_tokens: int = 256    # at most so many tokens of a sample
    temperature: float = 1.0     # 0 = greedy
    top_p: float = 1.0           # sample from the likeliest tokens that hold this much probability; 1 = all
    top_k: int = 0               # sample from so many likeliest tokens; 0 = all
    seed: int | None = None      # same seed, same text; none = another each time
    tokenizer: str = ""          # name or file; empty = what the model's folder says, or World if it has 65536 ids
    device: str = "auto"         # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of weights and computation; auto = bfloat16 on CUDA


@dataclass
class Completion:
    tokens: list = field(default_factory=list)      # ids, with the stop id that ended them
    text: str = ""                                  # decoded, without stop id and stop text
    logprobs: list = field(default_factory=list)    # of each token under softmax(logits / temperature), before top-p/k
    finish_reason: str = "length"                   # "stop" | "length"


# ---------------------------------------------------------------------------------------------------------------------
# the engine

@torch.no_grad()
def prefill(model, prompts, state=None):
    """Read token lists, each from its row of `state` (or zeros) -> (logits [P, V] after the last token, state [.., P, ..]).

    Short prompts are read together, packed end to end; a long one in pieces that hand the state on.
    """
    if not all(prompts):
        raise UserError("a prompt is empty; begin with the tokenizer's end id, which starts a document")
    state = state or model.initial_state(len(prompts))
    device = model.emb.weight.device
    logits, states, i = [], [], 0
    while i < len(prompts):
        j = i + 1
        while j < len(prompts) and sum(map(len, prompts[i:j + 1])) <= PREFILL:
            j += 1
        s = {k: v[:, i:j] for k, v in state.items()}
        if j == i + 1:
            for at in range(0, len(prompts[i]), PREFILL):
                out, s = model(torch.tensor([prompts[i][at:at + PREFILL]], device=device), s, last_only=True)
        else:
            borders = np.cumsum([0, *map(len, prompts[i:j])])
            ids = torch.tensor([sum(prompts[i:j], [])], device=device)
            out, s = model(ids, s, cu_seqlens=torch.from_numpy(borders), last_only=True)
        logits.append(out[:, 0])
        states.append(s)
        i = j
    return torch.cat(logits), {k: torch.cat([s[k] for s in states], 1) for k in state}


def pick(logits, u, temperature, top_p, top_k):
    """logits [B, V], u [B] uniform in [0, 1) -> (ids [B], log-probabilities [B] under the tempered distribution).

    Inverse of the cumulative distribution, so that a row's choice depends on its own number alone."""
    logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        ids = logp.argmax(-1)
        return ids, logp.gather(-1, ids[:, None])[:, 0]
    p, order = logp.exp(), None
    if top_k or top_p < 1:
        p, order = p.sort(-1, descending=True)
        keep = p.cumsum(-1) - p < top_p  # the first token always stays
        if top_k:
            keep[:, top_k:] = False
        p = p * keep
    c = p.cumsum(-1)
    ids = torch.searchsorted(c, u[:, None] * c[:, -1:], right=True)[:, 0].clamp(max=p.shape[1] - 1)
    ids = ids if order is None else order.gather(-1, ids[:, None])[:, 0]
    return ids, logp.gather(-1, ids[:, None])[:, 0]


@torch.no_grad()
def stream(model, prompts, *, rows=None, max_new_tokens=256, temperature=1.0, top_p=1.0, top_k=0, stop_ids=None,
           stop=(), tokenizer=None, seed=None, state=None):
    """Yield (row, Completion so far) for every new token, step by step, of the samples `rows`, pairs (prompt index,
    sample index); None: one of each prompt. The other arguments as in `generate`."""
    stop_ids = {tokenizer.end_id} if stop_ids is None and tokenizer else set(stop_ids or ())
    stop = (stop,) if isinstance(stop, str) else stop
    if stop and tokenizer is None:
        raise ValueError("stop texts need a tokenizer")
    if temperature < 0 or seed is not None and seed < 0:
        raise UserError(f"temperature={temperature}, seed={seed}: expected numbers from 0")
    rows = rows or [(p, 0) for p in range(len(prompts))]
    used = sorted({p for p, _ in rows})
    if state is not None:
        shared = state["wkv"].shape[1] == 1
        state = {k: v[:, [0 if shared else p for p in used]] for k, v in state.items()}
    logits, state = prefill(model, [prompts[p] for p in used], state)
    fork = [used.index(p) for p, _ in rows]  # every prompt is read once
    logits, state = logits[fork], {k: v[:, fork] for k, v in state.items()}
    seed = seed if seed is not None else int(np.random.SeedSequence().entropy % 2 ** 63)
    streams = [np.random.default_rng((seed, p, i)) for p, i in rows]
    alive, completions = list(range(len(rows))), [Completion() for _ in rows]
    # a stop text of m characters lies within the last 4 m + 4 tokens, even when each is one byte
    tail = 4 * max(map(len, stop), default=0) + 4
    for step in range(max_new_tokens):
        u = torch.tensor([streams[row].random() for row in alive], device=logits.device)
        ids, logps = pick(logits, u, temperature, top_p, top_k)
        going = []
        for at, (row, token, logp) in enumerate(zip(alive, ids.tolist(), logps.tolist())):
            c = completions[row]
            c.tokens.append(token)
            c.logprobs.append(logp)
            hit = token in stop_ids or (stop and any(s in tokenizer.decode(c.tokens[-tail:]) for s in stop))
            if hit:
                c.finish_reason = "stop"
            else:
                going.append(at)
            if (hit or step == max_new_tokens - 1) and tokenizer:
                c.text = tokenizer.decode(c.tokens[:-1] if token in stop_ids else c.tokens)
                c.text = c.text[:min((i for s in stop if (i := c.text.find(s)) >= 0), default=None)]
            yield row, c
        if not going or step == max_new_tokens - 1:
            return
        if len(going) < len(alive):  # finished rows leave the batch
            alive, ids = [alive[at] for at in going], ids[going]
            state = {k: v[:, going] for k, v in state.items()}
        logits, state = model(ids[:, None], state)
        logits = logits[:, 0]


def generate(model, prompts, *, n=1, batch_size=None, seed=None, state=None, **options):
    """prompts: P lists of ids -> list of P * n Completions, prompt-major.

    max_new_tokens, temperature (0 = greedy), top_p, top_k, stop_ids (default: the tokenizer's end id), stop (texts),
    tokenizer (for .text and stop). state: one for all prompts, or one row per prompt. batch_size: sequences at a time.
    The random stream of a completion depends on (seed, prompt index, sample index) alone.
    """
    seed = seed if seed is not None else int(np.random.SeedSequence().entropy % 2 ** 63)
    rows, out = [(p, i) for p in range(len(prompts)) for i in range(n)], []
    for at in range(0, len(rows), batch_size or len(rows) or 1):
        batch = rows[at:at + (batch_size or len(rows))]
        got = dict(stream(model, prompts, rows=batch, seed=seed, state=state, **options))
        out += [got.get(row, Completion()) for row in range(len(batch))]
    return out


def show_answers(model, documents, tokenizer, n, off=False):
    """Print what the model answers, greedily, where the last reply of the first n held-out documents begins; off: also
    what it answers without its adapter or tuned state."""
    cuts = []
    for ids, mask in documents[:n]:
        end = len(mask) - mask[::-1].index(1)
        start = end - (mask[:end][::-1].index(0) if 0 in mask[:end] else end)
        cuts.append((ids[:start], ids[start:end]))
    if not all(prompt for prompt, _ in cuts):
        return
    options = dict(max_new_tokens=128, temperature=0, tokenizer=tokenizer, stop=("\n\nUser:",))
    answers = generate(model, [prompt for prompt, _ in cuts], **options)
    with model.reference() if off else contextlib.nullcontext():
        without = generate(model, [prompt for prompt, _ in cuts], **options) if off else answers
    for (prompt, want), got, base in zip(cuts, answers, without):
        common.print0(f"  {tokenizer.decode(prompt)[-200:]!r}\n    model: {got.text!r}\n"
                      + f"    off:   {base.text!r}\n" * off + f"    data:  {tokenizer.decode(want)!r}")


# ---------------------------------------------------------------------------------------------------------------------
# the command

def load(cfg):
    """-> (model, tokenizer, {name: state or None}) of the command line; a state's .json says which model it belongs to."""
    states, abouts = {}, []
    for path in cfg.state or ("none",):
        states[path], about = (None, {}) if path == "none" else read_state(path)
        abouts.append((path, about))
    path, about = next(((path, about) for path, about in abouts if about), ("", {}))
    places = [Path(path).parent / str(about.get("model")), Path(path).parent / Path(str(about.get("model"))).name]
    weights = cfg.model or next((str(p) for p in places if p.is_file()), None)
    if weights and Path(weights).is_dir():
        raise UserError(f"{weights} is a folder; give a file in it: --model={weights}/rwkv-final.pth")
    if not weights:
        raise UserError("which model? --model=FILE, a .pth or .safetensors" + (
            f"; {places[0]}, which {path} was tuned on, is not there" if about else
            f"; no .json beside {cfg.state[0]} says which one it was tuned on" if cfg.state else ""))
    device, dtype = common.pick_device(cfg)
    model = RWKV.from_pretrained(weights, device, dtype).eval()
    for path, about in abouts:
        if states[path]:
            states[path] = {k: v.to(device) for k, v in read_state(path, model.config)[0].items()}  # now checked
            if about.get("fingerprint") not in (None, model.fingerprint()):
                print(f"warning: {path} was tuned on {about.get('model')}, and {weights} has other weights", file=sys.stderr)
    name = cfg.tokenizer or str(about.get("tokenizer", ""))
    beside = Path(path).parent / name
    tokenizer = prepare.tokenizer_of(weights, model.config.vocab_size, str(beside) if name and beside.is_file() else name)
    return model, tokenizer, states, weights


def read_prompts(path):
    """A prompt a line; of a .jsonl file the "prompt" of every line."""
    if not Path(path).is_file():
        raise UserError(f"{path} does not exist; --prompts wants a file with a prompt a line")
    lines = [line for line in Path(path).read_text(encoding="utf-8").splitlines() if line.strip()]
    if Path(path).suffix != ".jsonl":
        return lines
    out = []
    for number, line in enumerate(lines, 1):
        try:
            out.append(json.loads(line)["prompt"])
        except (json.JSONDecodeError, KeyError, TypeError):
            raise UserError(f'{path}:{number}: expected {{"prompt": "…"}}, got {line[:60]!r}') from None
    return out


def print_stream(pieces, tokenizer):
    """Print one sample as it comes; a character whose bytes are not all there yet waits. -> its Completion"""
    shown, c = "", Completion()
    for _, c in pieces:
        text = c.text or tokenizer.decode(c.tokens).removesuffix("\ufffd")
        if text.startswith(shown):
            print(text[len(shown):], end="", flush=True)
            shown = text
    print(flush=True)
    return c


def chat(model, tokenizer, cfg, options, state=None):
    """Turns in, turns out. The state behind the conversation so far is kept; only what is new is read."""
    messages = [{"role": "system", "content": cfg.system}] if cfg.system else []
    read = 0
    while True:
        try:
            line = input("User: ").strip()
        except EOFError:
            line = ""
        if not line:
            return
        messages.append({"role": "user", "content": line})
        ids, _ = prepare.render_chat(messages, tokenizer, generation_prompt=True)
        _, state = prefill(model, [ids[read:-1]], state)
        read = len(ids) - 1
        print("\nAssistant:", end="", flush=True)
        c = print_stream(stream(model, [ids[-1:]], state=state, stop=("\n\nUser:", "\n\nSystem:", "\n\nAssistant:"),
                                **options), tokenizer)
        print()
        messages.append({"role": "assistant", "content": c.text.strip() or "…"})


def main(cfg):
    model, tokenizer, states, weights = load(cfg)
    options = dict(max_new_tokens=cfg.max_new_tokens, temperature=cfg.temperature, top_p=cfg.top_p, top_k=cfg.top_k,
                   seed=cfg.seed, tokenizer=tokenizer)
    texts = read_prompts(cfg.prompts) if cfg.prompts else [cfg.prompt]
    prompts = [tokenizer.encode(text) or [tokenizer.end_id] for text in texts]
    if (cfg.chat or cfg.save_state) and (len(states) > 1 or len(prompts) > 1):
        raise UserError("--chat and --save_state take one prompt and one --state")
    if cfg.save_state:
        _, state = prefill(model, prompts, *states.values())
        write_state(state, cfg.save_state, model=os.path.relpath(weights, Path(cfg.save_state).parent),
                    fingerprint=model.fingerprint(), tokenizer=cfg.tokenizer, prompt=texts[0])
        return print(f"{cfg.save_state}: the state after {len(prompts[0])} tokens")
    if cfg.chat:
        return chat(model, tokenizer, cfg, options, *states.values())
    for name, state in states.items():
        if len(states) > 1:
            print(f"=== state {name}")
        if len(prompts) * cfg.n == 1:
            print(texts[0], end="", flush=True)
            print_stream(stream(model, prompts, state=state, **options), tokenizer)
            continue
        for i, c in enumerate(generate(model, prompts, n=cfg.n, state=state, **options)):
            print(f"--- prompt {i // cfg.n + 1}, sample {i % cfg.n + 1}, {c.finish_reason}\n{texts[i // cfg.n]}{c.text}", flush=True)


if __name__ == "__main__":
    try:
        main(common.read_flags(Config))
    except KeyboardInterrupt:
        print()
        sys.exit(130)
