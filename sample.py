"""Text from a model: continue a prompt, several prompts at once, or chat.

    python sample.py --model=out/pretrain_tiny/rwkv-final.pth --prompt="def "
    python sample.py --model=RWKV-x070-World-0.1B.pth --chat
    python sample.py --model=... --prompts=prompts.txt --n=4 --temperature=0.8 --top_p=0.9
    python sample.py --state=none --state=out/state/state-final.pth --prompt="..."      base against tuned state
    python sample.py --model=... --prompt="a long text" --save_state=cache.pth          then --state=cache.pth goes on
    python sample.py batch in.jsonl out.jsonl --model=... --n=4     each row again, with "completions"; run again, it goes on

One constant-size state per sequence; a prompt is read once and forked into its n samples. `generate` below is the engine
that everything else uses too. No compiler is needed, and a CPU is enough.
"""

import contextlib
import json
import math
import os
import sys
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from tqdm import tqdm

import common
import prepare
from common import UserError
from model import base_of, load_model, packed, read_state, write_state

PREFILL = 4096  # prompt tokens read at a time: bounds the memory of long and of many prompts
TURNS = ("\n\nUser:", "\n\nSystem:", "\n\nAssistant:")  # a reply that begins another turn is over


@dataclass
class Sampling:
    """How to sample: flags of the command line, keywords of `generate`."""

    n: int = 1  # samples of each prompt
    max_new_tokens: int = (
        256  # at most so many tokens of a sample; `generate` also takes a list, one for each prompt
    )
    temperature: float = 1.0  # 0 = greedy
    top_p: float = 1.0  # sample from the likeliest tokens that hold this much probability; 1 = all
    top_k: int = 0  # sample from so many likeliest tokens; 0 = all
    min_p: float = (
        0.0  # leave out tokens less likely than this share of the likeliest one's probability
    )
    presence_penalty: float = (
        0.0  # taken off the logit of every token generated before, as in the RWKV runners
    )
    frequency_penalty: float = (
        0.0  # the same for each time that it was; blanks and digits do not count
    )
    penalty_decay: float = (
        1.0  # by which those counts shrink at every token; the runners have 0.996
    )
    repetition_penalty: float = (
        1.0  # logits of tokens of prompt and completion: / this if above 0, * this if below
    )
    stop: tyro.conf.UseAppendAction[
        tuple[str, ...]
    ] = ()  # text that ends a sample; repeated: any of them
    batch_size: int | None = (
        None  # sequences at a time; none = what fits in 2 GiB, or in a quarter of the GPU
    )
    seed: int | None = None  # same seed, same text; none = another each time


@dataclass
class Config(Sampling):
    model: str = (
        ""  # weights or a LoRA, .pth or .safetensors; empty = the one that the state was tuned on
    )
    prompt: str = ""  # text to continue
    prompts: str = ""  # file with a prompt a line, or .jsonl with {"prompt": …} lines
    chat: bool = False  # talk: a turn a line, an empty line or Ctrl-D ends
    system: str = ""  # chat: a system turn to begin with
    state: tyro.conf.UseAppendAction[
        tuple[str, ...]
    ] = ()  # tuned state; repeated: side by side; "none" is one too
    save_state: str = ""  # keep the state after the prompt in this file, and stop
    tokenizer: str = (
        ""  # name or file; empty = what the model's folder says, or World if it has 65536 ids
    )
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # of weights and computation; auto = bfloat16 on CUDA
    )


@dataclass(kw_only=True)
class BatchConfig(Config):
    rows: tyro.conf.Positional[str]  # .jsonl, a row a line
    out: tyro.conf.Positional[
        str
    ]  # .jsonl, the same rows with "completions"; what it has already is not done again
    column: str = "prompt"  # the column with the prompt: text, or a list of messages
    logprobs: bool = False  # also write tokens and their log-probabilities


@dataclass
class Completion:
    tokens: list = field(default_factory=list)  # ids, with the stop id that ended them
    text: str = ""  # decoded at the end, without stop id, cut at the stop text
    logprobs: list = field(
        default_factory=list
    )  # of each token under softmax(logits / temperature), before all else
    finish_reason: str | None = None  # "stop" | "length"; None: still growing
    state: dict | None = None  # on request, [L, 1, …]: after the prompt and tokens[:-1]


# ---------------------------------------------------------------------------------------------------------------------
# the engine


@contextlib.contextmanager
def inference(model):
    """Dropout off, and single tokens in C++ if it is built; afterwards every module is as it was."""
    training, model.step = [m for m in model.modules() if m.training], model.stepper()
    model.eval()
    try:
        yield
    finally:
        model.step = None
        for m in training:
            m.training = True


def spans(lengths, most):
    """[(i, j), …]: neighbours that fit in one packed pass, at most `most` of them; what is too long goes alone."""
    out, i, total = [], 0, 0
    for j, length in enumerate(lengths):
        if j > i and (total + length > PREFILL or j - i >= most):
            out.append((i, j))
            i, total = j, 0
        total += length
    return out + [(i, len(lengths))] * bool(lengths)


def check_ids(model, lists, what="prompt"):
    for i, ids in enumerate(lists, 1):
        if not ids:
            raise UserError(
                f"{what} {i} of {len(lists)}: the {what} is empty; begin with the tokenizer's end id, "
                "which starts a document"
            )
        if not 0 <= min(ids) <= max(ids) < model.config.vocab_size:
            raise UserError(
                f"{what} {i} of {len(lists)} has id {max(ids) if min(ids) >= 0 else min(ids)}; this model's go "
                f"from 0 to {model.config.vocab_size - 1}; is it another tokenizer's?"
            )


@torch.no_grad()
def prefill(model, prompts, state=None):
    """Read token lists, each from its row of `state` (or the initial one) -> (logits [P, V] after the last token,
    state [.., P, ..]).

    Short prompts are read together, packed end to end; a long one in pieces that hand the state on.
    """
    check_ids(model, prompts)
    state, device = state or model.initial_state(len(prompts)), model.emb.weight.device
    logits, states = [], []
    for i, j in spans(list(map(len, prompts)), len(prompts)):
        s, (ids, borders) = {k: v[:, i:j] for k, v in state.items()}, packed(prompts[i:j], device)
        if j > i + 1:
            out, s = model(ids, s, cu_seqlens=borders, last_only=True)
        for piece in ids.split(PREFILL, 1) if j == i + 1 else ():
            out, s = model(piece, s, last_only=True)
        logits.append(out[:, 0])
        states.append(s)
    return torch.cat(logits), {k: torch.cat([s[k] for s in states], 1) for k in state}


def slots_for(model, memory=None):
    """Sequences that fit in `memory` bytes (default: 2 GiB, on CUDA a quarter of the card): for each its state, one
    of the prompts read ahead and one of those before, and half a dozen rows of the vocabulary. The machine's load plays no
    part, so that runs repeat."""
    c, device, size = (
        model.config,
        model.emb.weight.device,
        (model.compute_dtype or model.emb.weight.dtype).itemsize,
    )
    if memory is None:
        memory = (
            torch.cuda.get_device_properties(device).total_memory // 4
            if device.type == "cuda"
            else 2**31
        )
    return max(
        1,
        int(memory)
        // (3 * c.n_layer * c.n_embd * (4 * c.head_size + 2 * size) + 6 * 4 * c.vocab_size),
    )


def draw(p, u, top_p=1.0, top_k=0, min_p=0.0, width=256):
    """Probabilities p [B, V], u [B] uniform in [0, 1) -> ids [B], by the inverse of the cumulative distribution, so that a
    row's choice depends on its own numbers alone.

    top_p, top_k and min_p (a share of the likeliest token's) each rule out tokens of p, the likeliest one never. Only the
    `width` likeliest are sorted; rows that keep them all are done again with more.
    """
    order, c = None, p
    if top_k or top_p < 1 or min_p:
        width = min(top_k or width, p.shape[1])
        c, order = p.topk(width)
        keep = (c.cumsum(-1) - c < top_p) & (c >= min_p * c[:, :1])
        c = c * keep
    c = c.cumsum(-1)
    # below the sum even when rounded: the last token might be one that was ruled out
    target = torch.minimum(u[:, None] * c[:, -1:], c[:, -1:] * (1 - 2**-23))
    ids = torch.searchsorted(c, target, right=True).clamp(max=c.shape[1] - 1)
    if order is None:
        return ids[:, 0]
    ids = order.gather(-1, ids)[:, 0]
    if width < (top_k or p.shape[1]) and (more := keep[:, -1]).any():
        ids[more] = draw(p[more], u[more], top_p, top_k, min_p, 16 * width)
    return ids


def pick(logits, u, temperature, top_p=1.0, top_k=0, min_p=0.0, changed=None):
    """logits [B, V], u [B] -> (ids [B], log-probabilities [B] under softmax(logits / temperature)). changed: the logits
    after penalties and biases, which the choice is made from."""
    logp = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    q = logp if changed is None else (changed / (temperature or 1.0)).log_softmax(-1)
    ids = q.argmax(-1) if temperature == 0 else draw(q.exp(), u, top_p, top_k, min_p)
    return ids, logp.gather(-1, ids[:, None])[:, 0]


def check_options(model, o, stop_ids, logit_bias, tokenizer):
    above_0, finite = math.ulp(0.0), sys.float_info.max
    for name, low, high, want in (
        ("n", 1, finite, "a number above 0"),
        ("max_new_tokens", 1, finite, "a number above 0"),
        ("min_p", 0, 1, "0 to 1"),
        ("temperature", 0, finite, "0 (greedy) or more"),
        ("top_p", above_0, 1, "above 0, at most 1 (all)"),
        ("top_k", 0, finite, "0 (all) or more"),
        ("repetition_penalty", above_0, finite, "above 0; 1 = none"),
        ("penalty_decay", 0, 1, "0 to 1"),
        ("batch_size", 1, finite, "a number above 0, or none"),
        ("seed", 0, finite, "0 or more, or none"),
    ):
        value = min(o.max_new_tokens, default=1) if name == "max_new_tokens" else getattr(o, name)
        if value is not None and not low <= value <= high:
            raise UserError(f"{name}={value}: expected {want}")
    for name, ids in (("stop_ids", stop_ids), ("logit_bias", logit_bias)):
        if wrong := [i for i in ids if not 0 <= i < model.config.vocab_size]:
            raise UserError(
                f"{name}: {wrong[0]} is not an id of this model; they go from 0 to {model.config.vocab_size - 1}"
            )
    for s in o.stop:
        if not tokenizer:
            raise UserError(
                f"stop={s!r}: stop texts need a tokenizer; give tokenizer=, or stop_ids"
            )
        if not s:
            raise UserError("stop='' is empty; leave it out")
        try:
            tokenizer.encode(s)
        except UserError as e:
            raise UserError(f"stop={s!r} can never be generated: {e}") from None


class Penalties:
    """What moves the logits [slots, V] away from the model's own: counts of each slot's tokens, and biases."""

    def __init__(self, o, slots, V, device, logit_bias, tokenizer):
        self.o, self.tokenizer, self.bias = o, tokenizer, torch.zeros(V, device=device)
        for i, value in logit_bias.items():
            self.bias[i] = value
        # how often generated, decaying; generated at all; generated or in the prompt
        self.count, self.seen, self.read = (
            torch.zeros(slots, V, dtype=dtype, device=device)
            for dtype in (torch.float32, torch.bool, torch.bool)
        )

    def start(self, slot, prompt):
        self.count[slot], self.seen[slot], self.read[slot] = 0, False, False
        self.read[slot, prompt] = True

    def apply(self, logits, at):
        """logits of the slots `at` -> those that the choice is made from"""
        o, logits = self.o, logits.float()
        factor = torch.where(logits > 0, 1 / o.repetition_penalty, o.repetition_penalty)
        logits = torch.where(self.read[at], logits * factor, logits)
        return (
            logits
            - (o.presence_penalty * self.seen[at] + o.frequency_penalty * self.count[at])
            + self.bias
        )

    def chosen(self, at, ids):
        # as the RWKV runners: blanks and digits count as 0 times, and only `seen` holds them back
        weights = [
            float(not self.tokenizer or self.tokenizer.decode([t]) not in " \t0123456789")
            for t in ids.tolist()
        ]
        self.count[at] *= self.o.penalty_decay
        self.count[at, ids] += torch.tensor(weights, device=ids.device)
        self.seen[at, ids] = self.read[at, ids] = True


def waiting(model, prompts, n, state, slots):
    """(prompt, sample, the prompt's logits [V], state [L, …]) of every completion in order; prompts are read a packed pass at
    a time, equal ones once."""
    same, own = {}, state and state["wkv"].shape[1] > 1  # (ids, row of the state) -> prompts
    for p, ids in enumerate(prompts):
        same.setdefault((tuple(ids), p if own else 0), []).append(p)
    keys = list(same)
    for i, j in spans([len(ids) for ids, _ in keys], slots):
        start = state and {
            k: v[:, [row for _, row in keys[i:j]]].to(model.emb.weight.device)
            for k, v in state.items()
        }
        logits, s = prefill(model, [list(ids) for ids, _ in keys[i:j]], start)
        for at, key in enumerate(keys[i:j]):
            for p in same[key]:
                yield from (
                    (p, sample, logits[at], {k: v[:, at] for k, v in s.items()})
                    for sample in range(n)
                )


def grow(c, token, logp, limit, stop_ids, stop, tokenizer):
    """One more token of a Completion, and whether it is the last."""
    c.tokens.append(token)
    c.logprobs.append(logp)
    # a stop text of m bytes lies within the last m tokens that are not empty; some are
    tail = 2 * max((len(s.encode()) for s in stop), default=0) + 4
    if token in stop_ids or stop and any(s in tokenizer.decode(c.tokens[-tail:]) for s in stop):
        c.finish_reason = "stop"
    elif len(c.tokens) == limit:
        c.finish_reason = "length"
    if c.finish_reason and tokenizer:
        c.text = tokenizer.decode(c.tokens[:-1] if token in stop_ids else c.tokens)
        c.text = c.text[: min((i for s in stop if (i := c.text.find(s)) >= 0), default=None)]


@torch.no_grad()
def stream(
    model,
    prompts,
    *,
    logit_bias=None,
    stop_ids=None,
    tokenizer=None,
    state=None,
    memory=None,
    indices=None,
    return_state=False,
    **sampling,
):
    """Yield (number of the completion, Completion so far) for every new token. The arguments as in `generate`.

    A fixed number of slots decode together. A row that ends leaves its slot to the next one waiting, which begins with a
    copy of its prompt's state; when none waits, the slot is computed on and ignored. While this runs dropout is off.
    """
    model, o = getattr(model, "module", model), Sampling(**sampling)
    o.stop = (o.stop,) if isinstance(o.stop, str) else tuple(o.stop)
    stop_ids = {tokenizer.end_id} if stop_ids is None and tokenizer else set(stop_ids or ())
    o.max_new_tokens = (
        [o.max_new_tokens] * len(prompts)
        if isinstance(o.max_new_tokens, int)
        else list(o.max_new_tokens)
    )
    indices = range(len(prompts)) if indices is None else indices
    check_options(model, o, stop_ids, logit_bias or {}, tokenizer)
    check_ids(model, prompts)
    if state and (given := state["wkv"].shape[1]) not in (1, len(prompts)):
        raise UserError(
            f"state has {given} rows for {len(prompts)} prompts; give one row for all, or one for each"
        )
    seed = o.seed if o.seed is not None else int(np.random.SeedSequence().entropy % 2**63)
    device, slots = (
        model.emb.weight.device,
        min(o.batch_size or slots_for(model, memory), len(prompts) * o.n),
    )
    penalties = None
    if o.presence_penalty or o.frequency_penalty or o.repetition_penalty != 1 or logit_bias:
        penalties = Penalties(
            o, slots, model.config.vocab_size, device, logit_bias or {}, tokenizer
        )
    rows, queue, held = [None] * slots, waiting(model, prompts, o.n, state, slots), None
    ids = torch.zeros(slots, dtype=torch.long, device=device)
    with inference(model):
        while True:
            new = list(zip([slot for slot in range(slots) if rows[slot] is None], queue))
            if new:  # their first token comes from their prompt's logits
                at, logits = (
                    [slot for slot, _ in new],
                    torch.stack([out for _, (*_, out, _) in new]),
                )
                for slot, (p, sample, _, s) in new:
                    held = held or {
                        k: v.new_zeros(len(v), slots, *v.shape[1:]) for k, v in s.items()
                    }
                    for k in held:
                        held[k][:, slot] = s[k]
                    rows[slot] = (
                        p * o.n + sample,
                        o.max_new_tokens[p],
                        np.random.default_rng((seed, indices[p], sample)),
                        Completion(),
                    )
                    if penalties:
                        penalties.start(slot, prompts[p])
            elif any(rows):
                at, logits = list(range(slots)), model(ids[:, None], held, out=held)[0][:, 0]
            else:
                return
            u = torch.tensor(
                [rows[slot][2].random(dtype=np.float32) if rows[slot] else 0.5 for slot in at],
                device=device,
            )
            chosen, logps = pick(
                logits,
                u,
                o.temperature,
                o.top_p,
                o.top_k,
                o.min_p,
                penalties and penalties.apply(logits, at),
            )
            ids[at] = chosen
            if penalties:
                penalties.chosen(at, chosen)
            for slot, token, logp in zip(at, chosen.tolist(), logps.tolist()):
                if rows[slot]:
                    number, limit, _, c = rows[slot]
                    grow(c, token, logp, limit, stop_ids, o.stop, tokenizer)
                    if c.finish_reason:
                        rows[slot] = None
                        c.state = (
                            {k: v[:, slot : slot + 1].clone() for k, v in held.items()}
                            if return_state
                            else None
                        )
                    yield number, c


def generate(model, prompts, *, n=1, callback=None, progress=None, **options):
    """prompts: P lists of ids -> list of P * n Completions, prompt-major. Uses the live weights; `model` may be a DDP wrapper.

    options: the fields of Sampling, and logit_bias {id: added}; stop_ids (default: the tokenizer's end id); tokenizer (for
    .text and stop); state: one for all prompts, or one row per prompt; None: the initial one. return_state: .state of each
    completion. memory: bytes, what batch_size follows from, see slots_for.
    The random stream of a completion depends on (seed, prompt index, sample index) alone; indices: other numbers for the
    prompts than 0 … P - 1, as for the share of one process.
    callback(number, Completion so far): at every token. progress: None = a bar when rows have to wait for a slot.
    """
    out = [None] * (len(prompts) * n)
    slots = options.get("batch_size") or slots_for(
        getattr(model, "module", model), options.get("memory")
    )
    hidden = (
        not progress if progress is not None else len(out) <= slots or None
    )  # None: hidden unless a terminal
    with tqdm(total=len(out), unit="seq", disable=hidden) as bar:
        for number, c in stream(model, prompts, n=n, **options):
            out[number] = c
            if callback:
                callback(number, c)
            if c.finish_reason:
                bar.update()
    return out


@torch.no_grad()
def score_choices(model, prompts, choices, *, state=None, temperature=1.0, per_token=False):
    """Log-probabilities of fixed continuations. choices: for each prompt a list of lists of ids -> for each prompt a list
    with each choice's sum (per_token: its list). A prompt is read once; its choices go on from copies of its state, packed.
    state: as in `generate`."""
    model = getattr(model, "module", model)
    device, out, most = model.emb.weight.device, [], slots_for(model)
    if len(choices) != len(prompts) or temperature <= 0:
        raise UserError(
            f"{len(prompts)} prompts, {len(choices)} lists of choices, temperature={temperature}: expected "
            "a list for each prompt and a temperature above 0"
        )
    check_ids(model, prompts)
    check_ids(model, [ids for options in choices for ids in options], "choice")
    with inference(model):
        for i, j in spans(list(map(len, prompts)), most):
            rows = state and {
                k: (v[:, i:j] if v.shape[1] > 1 else v.expand(-1, j - i, *v.shape[2:])).to(device)
                for k, v in state.items()
            }
            logits, s = prefill(model, prompts[i:j], rows)
            first = (logits.float() / temperature).log_softmax(-1)
            flat = [(p, ids) for p in range(j - i) for ids in choices[i + p]]
            scores = [[first[p, ids[0]].item()] for p, ids in flat]
            for a, b in spans([len(ids) for _, ids in flat], most):
                (x, cu), (y, _) = (
                    packed([ids[cut] for _, ids in flat[a:b]], device)
                    for cut in (slice(-1), slice(1, None))
                )
                if x.shape[1] == 0:
                    continue
                fork = {k: v[:, [p for p, _ in flat[a:b]]] for k, v in s.items()}
                logps = model.token_logprobs(x, y, fork, cu_seqlens=cu, temperature=temperature)[
                    0
                ].split(cu.diff().tolist())
                scores[a:b] = [head + more.tolist() for head, more in zip(scores[a:b], logps)]
            mine = iter(scores if per_token else map(sum, scores))
            out += [[next(mine) for _ in choices[p]] for p in range(i, j)]
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
    options = dict(max_new_tokens=128, temperature=0, tokenizer=tokenizer)
    with contextlib.suppress(UserError):  # a vocabulary of moves or of numbers has no turns
        options["stop"] = TURNS[:1] if tokenizer.encode(TURNS[0]) else ()
    answers = generate(model, [prompt for prompt, _ in cuts], **options)
    with model.reference() if off else contextlib.nullcontext():
        without = generate(model, [prompt for prompt, _ in cuts], **options) if off else answers
    for (prompt, want), got, base in zip(cuts, answers, without):
        common.print0(
            f"  {tokenizer.decode(prompt)[-200:]!r}\n    model: {got.text!r}\n"
            + f"    off:   {base.text!r}\n" * off
            + f"    data:  {tokenizer.decode(want)!r}"
        )


# ---------------------------------------------------------------------------------------------------------------------
# the command


def load(cfg):
    """-> (model, tokenizer, {name: state or None}, the model's file) of the command line. cfg.model may also be a LoRA; it
    and a state say themselves which model they belong to."""
    found = {
        path: (None, {}) if path == "none" else read_state(path) for path in cfg.state or ("none",)
    }
    path, about = next(
        ((path, about) for path, (_, about) in found.items() if about), (next(iter(found)), {})
    )
    weights = cfg.model or base_of("" if path == "none" else path, about)
    if Path(weights).is_dir():
        raise UserError(
            f"{weights} is a folder; give a file in it: --model={weights}/rwkv-final.pth"
        )
    device, dtype = common.pick_device(cfg)
    model, of_model = load_model(weights, device, dtype)
    states = {
        name: state
        and {k: v.to(device) for k, v in read_state(name, model.config)[0].items()}  # now checked
        for name, (state, _) in found.items()
    }
    for name, (_, says) in found.items():
        if says.get("fingerprint") not in (None, model.fingerprint()):
            print(
                f"warning: {name} was tuned on {says.get('model')}, and {weights} has other weights",
                file=sys.stderr,
            )
    where, says = (
        (weights, of_model)
        if of_model
        else (path, about)
        if about.get("tokenizer")
        else (weights, {})
    )
    tokenizer = prepare.tokenizer_of(where, model.config.vocab_size, cfg.tokenizer, says)
    return model.eval(), tokenizer, states, weights


def read_prompts(path, column="prompt", kinds=str):
    """-> [(row, prompt)]: of a .jsonl file every line and what it has in `column`; of another file the line itself."""
    if Path(path).suffix == ".jsonl":
        rows = prepare.read_jsonl(path, f'{{"{column}": "…"}}')
    elif Path(path).is_file():
        rows = [
            (path, {column: line.rstrip("\r")})
            for line in prepare.read_text(path).split("\n")
            if line.strip()
        ]
    else:
        raise UserError(
            f"{path} does not exist; --prompts wants a file with a prompt a line, batch one of JSON rows"
        )
    out = []
    for where, row in rows:
        if not isinstance(row.get(column), kinds):
            raise UserError(f'{where}: expected {{"{column}": "…"}}')
        out.append((row, row[column]))
    return out


def print_stream(pieces, tokenizer, stop=()):
    """Print one sample as it comes; a character whose bytes are not all there yet waits, and so does what may become a
    stop text. -> its Completion"""
    shown, c = "", Completion()
    for _, c in pieces:
        text = tokenizer.decode(c.tokens).removesuffix("\ufffd")
        held = max(
            (n for s in stop for n in range(1, len(s) + 1) if text.endswith(s[:n])), default=0
        )
        text = c.text if c.finish_reason else text[: len(text) - held]
        if text.startswith(shown):
            print(text[len(shown) :], end="", flush=True)
            shown = text
    print(flush=True)
    return c


def chat(model, tokenizer, cfg, options, state=None):
    """Turns in, turns out. The state behind the conversation so far is kept; only what is new is read."""
    messages, read = [{"role": "system", "content": cfg.system}] if cfg.system else [], 0
    options = {**options, "stop": TURNS + cfg.stop}
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
        c = print_stream(
            stream(model, [ids[-1:]], state=state, **options), tokenizer, options["stop"]
        )
        print()
        messages.append({"role": "assistant", "content": c.text.strip() or "…"})


def batch(cfg):
    """Rows of a JSONL file with their completions beside them, in order, each line written once it and all before it are
    done. The output says how far it is: killed at any moment, the next run drops half a line and goes on."""
    model, tokenizer, states, _ = load(cfg)
    if len(states) > 1:
        raise UserError("batch takes one --state")
    pairs = read_prompts(cfg.rows, cfg.column, (str, list))
    rows, texts = [row for row, _ in pairs], [text for _, text in pairs]
    chats, done, out = any(isinstance(text, list) for text in texts), 0, Path(cfg.out)
    prompts = [
        (
            prepare.render_chat(text, tokenizer, generation_prompt=True)[0]
            if isinstance(text, list)
            else tokenizer.encode(text)
        )
        or [tokenizer.end_id]
        for text in texts
    ]
    if out.is_file():
        lines = out.read_bytes().split(b"\n")[:-1]  # what follows the last line's end was cut off
        for done, line in enumerate(lines, 1):
            with contextlib.suppress(ValueError, LookupError, TypeError):
                row = json.loads(line)
                if (
                    len(row["completions"]) == cfg.n
                    and {**rows[done - 1], "completions": row["completions"]} == row
                ):
                    continue
            raise UserError(
                f"{out}:{done} is not row {done} of {cfg.rows} with {cfg.n} completions; give another file to write"
            )
        os.truncate(out, sum(len(line) + 1 for line in lines))
    options = {
        **options_of(cfg, tokenizer),
        "stop": cfg.stop + TURNS * chats,
        "state": next(iter(states.values())),
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    ready, at = {}, done
    with open(out, "ab") as f, tqdm(total=len(rows), initial=done, unit="row", disable=None) as bar:
        for number, c in stream(
            model, prompts[done:], n=cfg.n, indices=range(done, len(rows)), **options
        ):
            if not c.finish_reason:
                continue
            ready[done * cfg.n + number] = {
                "text": c.text,
                "finish_reason": c.finish_reason,
                **(
                    {"tokens": c.tokens, "logprobs": [round(x, 4) for x in c.logprobs]}
                    if cfg.logprobs
                    else {}
                ),
            }
            while all(at * cfg.n + i in ready for i in range(cfg.n)):
                row = {**rows[at], "completions": [ready.pop(at * cfg.n + i) for i in range(cfg.n)]}
                f.write(json.dumps(row, ensure_ascii=False).encode() + b"\n")
                f.flush()
                at += 1
                bar.update()
    print(f"{out}: {len(rows)} rows" + f", {done} of them from before" * bool(done))


def options_of(cfg, tokenizer):
    return {f.name: getattr(cfg, f.name) for f in fields(Sampling) if f.name != "n"} | {
        "tokenizer": tokenizer
    }


def main(cfg):
    model, tokenizer, states, weights = load(cfg)
    options = options_of(cfg, tokenizer)
    texts = [text for _, text in read_prompts(cfg.prompts)] if cfg.prompts else [cfg.prompt]
    prompts = [tokenizer.encode(text) or [tokenizer.end_id] for text in texts]
    if (cfg.chat or cfg.save_state) and (len(states) > 1 or len(prompts) > 1):
        raise UserError("--chat and --save_state take one prompt and one --state")
    if cfg.save_state:
        _, state = prefill(model, prompts, *states.values())
        write_state(
            state,
            cfg.save_state,
            model=os.path.relpath(weights, Path(cfg.save_state).parent),
            fingerprint=model.fingerprint(),
            prompt=texts[0],
            tokenizer=cfg.tokenizer
            if not Path(cfg.tokenizer).is_file()
            else os.path.relpath(cfg.tokenizer, Path(cfg.save_state).parent),
        )
        return print(f"{cfg.save_state}: the state after {len(prompts[0])} tokens")
    if cfg.chat:
        return chat(model, tokenizer, cfg, options, *states.values())
    for name, state in states.items():
        if len(states) > 1:
            print(f"=== state {name}")
        if len(prompts) * cfg.n == 1:
            print(texts[0], end="", flush=True)
            print_stream(stream(model, prompts, state=state, **options), tokenizer, cfg.stop)
            continue
        for i, c in enumerate(generate(model, prompts, n=cfg.n, state=state, **options)):
            p, sample = divmod(i, cfg.n)
            print(
                f"--- prompt {p + 1}, sample {sample + 1}, {c.finish_reason}\n{texts[p]}{c.text}",
                flush=True,
            )


if __name__ == "__main__":
    try:
        if sys.argv[1:2] == ["batch"]:
            batch(common.read_flags(BatchConfig, sys.argv[2:]))
        else:
            main(common.read_flags(Config))
    except KeyboardInterrupt:
        print()
        sys.exit(130)
