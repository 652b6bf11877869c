"""The generation engine: prompts in, completions out, with their log-probabilities.

Up to a number of slots decode together. Each prompt is read once and its state is forked into its
n samples; when a completion ends, its slot goes to the next one that waits, of the same request or
of another one with other options. No row feels another: what a completion is follows from its seed,
its prompt's index and its sample's index alone.

P prompts, B rows or slots, V vocabulary, L layers. A state is the network's: a dict [L, B, ...].
"""

import contextlib
import itertools
import math
from collections import deque
from dataclasses import dataclass, field
from typing import Annotated, Any

from gosling import penalties
from gosling.batch import pack_ids
from gosling.choice import settings_of, together
from gosling.config import Share, UserError, check
from gosling.grammar import bits_of, grammar_of
from gosling.graph import STATE, Rows, advance, choose, copies_for, graphs_for
from gosling.shard import place, shards
from gosling.tokenizer import agree, recorded_tokenizer, tokenizer_of
from gosling.tune import load_model
from wkv_cuda import fused

import numpy as np
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from tqdm import tqdm

PREFILL = 4096  # prompt tokens read at a time, which bounds the memory of long and of many prompts
LARGEST = 1e20  # penalties and biases; what they make of a logit stays a number in float32
COLDEST = 1e-6  # temperature above 0; a logit divided by less may not be one
TURNS = ("\n\nUser:", "\n\nSystem:", "\n\nAssistant:")  # a reply that begins another turn is over

Penalty = Annotated[float, Field(ge=-LARGEST, le=LARGEST)]
Factor = Annotated[float, Field(ge=1 / LARGEST, le=LARGEST)]


@dataclass
class Sampling:
    """How to sample: flags of the command line, keywords of `generate`."""

    n: PositiveInt = 1  # samples of each prompt
    max_new_tokens: PositiveInt = 256  # at most so many tokens of a sample
    temperature: NonNegativeFloat = 1.0  # 0 = greedy
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0  # likeliest tokens of this total; 1 = all
    top_k: NonNegativeInt = 0  # sample from so many likeliest tokens; 0 = all
    min_p: Share = 0.0  # leave out tokens less likely than this share of the likeliest one's p
    presence_penalty: Penalty = 0.0  # taken off the logit of every token generated before
    frequency_penalty: Penalty = 0.0  # the same for each time it was; not for blanks and digits
    penalty_decay: Share = 1.0  # by which those counts shrink at every token; RWKV runners: 0.996
    repetition_penalty: Factor = 1.0  # divides positive logits of tokens read or generated
    stop: tuple[str, ...] = ()  # texts that end a sample
    batch_size: PositiveInt | None = None  # sequences at a time; none = what fits in memory
    seed: NonNegativeInt | None = None  # same seed, same text; none = another each time


@dataclass
class Options(Sampling):
    """The other keywords of `generate`; max_new_tokens may be a list, one for each prompt."""

    max_new_tokens: PositiveInt | list[PositiveInt] = 256
    stop: str | list[str] | tuple[str, ...] = ()
    stop_ids: Any = None  # ids that end a completion; none = the tokenizer's end id
    logit_bias: Any = None  # {id: added to its logit}; -inf rules a token out
    tokenizer: Any = None  # for .text and stop
    state: Any = None  # one row for all prompts, or a row for each; none = the initial state
    return_state: bool = False  # whether each completion gets its .state
    indices: Any = None  # the prompts' numbers, for their random streams; none = 0 .. P - 1
    json_schema: dict | None = None  # that each text fits, see grammar.py
    regex: str | None = None  # that each text matches as a whole
    grammar: Any = None  # of one of the two; `complete` fills it in
    memory: int | None = None  # bytes that batch_size follows from, see slots_for


@dataclass
class Completion:
    """What was sampled. While it grows, text is empty and finish_reason None."""

    tokens: list = field(default_factory=list)  # ids, with the stop id that ended them
    text: str = ""  # without the stop id, cut at the stop text
    logprobs: list = field(default_factory=list)  # under softmax(logits / temperature) alone
    finish_reason: str | None = None  # "stop" | "length"
    state: dict | None = None  # on request, [L, 1, ...]: after the prompt and tokens[:-1]


def load(path, device, dtype, tokenizer="", another_base=False):
    """-> (model in eval mode, its tokenizer, what the file says of itself).

    path: weights, a LoRA or a tuned state. tokenizer: a name or a file; empty, the recorded one.
    another_base: see load_model.
    """
    model, about = load_model(path, device, dtype, another_base)
    return model.eval(), tokenizer_of(path, model.config.vocab_size, tokenizer, about), about


def load_second(what, path, model, tokenizer, cfg, run):
    """A model beside the one that trains, in eval mode, with what it is for: "reference", ...

    UserError unless it reads the same tokens as `model` and `tokenizer`.
    """
    device = "cpu" if shards(cfg, run) else run.device
    second, about = load_model(path, device, run.dtype, cfg.another_base)
    if second.config.vocab_size != model.config.vocab_size:
        raise UserError(
            f"{what}={path} has a vocabulary of {second.config.vocab_size}, the model one of "
            f"{model.config.vocab_size}; it must read the same tokens"
        )
    recorded = recorded_tokenizer(path, 0, tokenizer.name, about)
    agree({"the model that trains": tokenizer, f"{what}={path}": recorded})
    second.compute_dtype = run.dtype
    place(second, cfg, run)
    return second.eval()


@contextlib.contextmanager
def inference(model):
    """Dropout off; afterwards every module is in the mode it was in."""
    in_training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in in_training:
            module.training = True


# ----------------------------------------------------------------------------------------------
# reading prompts


def check_ids(model, lists, what="prompt", may_be_empty=False):
    """UserError for the first list that is empty or holds an id that the model does not have."""
    largest = model.config.vocab_size - 1
    for i, ids in enumerate(lists, 1):
        where = f"{what} {i} of {len(lists)}"
        if not ids and may_be_empty:
            continue
        if not ids:
            raise UserError(f"{where}: the {what} is empty; begin with the tokenizer's end id")
        wrong = [token for token in (min(ids), max(ids)) if not 0 <= token <= largest]
        if wrong:
            raise UserError(f"{where} has id {wrong[0]}; this model's go from 0 to {largest}")


def spans(lengths, most):
    """Neighbours that fit in one packed pass, at most `most` of them -> [(i, j), ...].

    What is longer than PREFILL goes alone.
    """
    pairs, first, total = [], 0, 0
    for i, length in enumerate(lengths):
        if i > first and (total + length > PREFILL or i - first >= most):
            pairs.append((first, i))
            first, total = i, 0
        total += length
    if lengths:
        pairs.append((first, len(lengths)))
    return pairs


def slots_for(model, memory=None):
    """How many sequences fit in `memory` bytes; by default 2 GiB, on CUDA a quarter of the card.

    Each has its state, one of the prompts read ahead and one of those before, and half a dozen rows
    of the vocabulary. The machine's load plays no part, so that runs repeat.
    """
    c, weight = model.config, model.emb.weight
    if memory is None:
        memory = 2**31
        if weight.device.type == "cuda":
            memory = torch.cuda.get_device_properties(weight.device).total_memory // 4
    shift_size = (model.compute_dtype or weight.dtype).itemsize
    state_bytes = c.n_layer * c.n_embd * (4 * c.head_size + 2 * shift_size)
    return max(1, int(memory) // (3 * state_bytes + 6 * 4 * c.vocab_size))


def state_rows(state, rows, device):
    """Rows of a caller's state, of which a single one stands for all -> state [L, rows, ...]"""
    if state is None:
        return None
    rows = list(rows) if state["wkv"].shape[1] > 1 else [0] * len(rows)
    return {key: value[:, rows].to(device) for key, value in state.items()}


@torch.no_grad()
def prefill(model, prompts, state=None):
    """Read lists of ids, each from its row of `state` or from the initial one.

    -> (logits [P, V] after the last token, state [L, P, ...]). Short prompts are read together,
    packed end to end; a long one in pieces that hand the state on.
    """
    check_ids(model, prompts)
    state = state or model.initial_state(len(prompts))
    if not prompts:
        return torch.zeros(0, model.config.vocab_size, device=model.emb.weight.device), state
    logits, states = [], []
    for i, j in spans([len(ids) for ids in prompts], len(prompts)):
        ids, cu_seqlens = pack_ids(prompts[i:j], model.emb.weight.device)  # [1, T]
        after = {key: value[:, i:j] for key, value in state.items()}
        if j > i + 1:
            out, after = model(ids, after, cu_seqlens=cu_seqlens, last_only=True)
        else:
            for piece in ids.split(PREFILL, 1):
                out, after = model(piece, after, last_only=True)
        logits.append(out[:, 0])
        states.append(after)
    return torch.cat(logits), {key: torch.cat([s[key] for s in states], 1) for key in state}


# ----------------------------------------------------------------------------------------------
# the engine


def complete(model, prompts, options):
    """Fill in the defaults that follow from other arguments; UserError for what makes no sense."""
    o, largest = options, model.config.vocab_size - 1
    check(o)
    check_ids(model, prompts)
    if isinstance(o.max_new_tokens, int):
        o.max_new_tokens = [o.max_new_tokens] * len(prompts)
    if o.stop_ids is None:
        o.stop_ids = [] if o.tokenizer is None else [o.tokenizer.end_id]
    o.stop_ids, o.logit_bias = set(o.stop_ids), o.logit_bias or {}
    o.stop = (o.stop,) if isinstance(o.stop, str) else tuple(o.stop)
    o.indices = range(len(prompts)) if o.indices is None else o.indices
    o.seed = int(np.random.SeedSequence().entropy % 2**63) if o.seed is None else o.seed
    for name, ids in (("stop_ids", o.stop_ids), ("logit_bias", o.logit_bias)):
        for token in ids:
            if not 0 <= token <= largest:
                raise UserError(f"{name}: {token} is not an id of this model, 0 to {largest}")
    if o.state and o.state["wkv"].shape[1] not in (1, len(prompts)):
        n_rows = o.state["wkv"].shape[1]
        raise UserError(f"state has {n_rows} rows for {len(prompts)} prompts; give one, or as many")
    for name, values in (("max_new_tokens", o.max_new_tokens), ("indices", o.indices)):
        if len(values) != len(prompts):
            raise UserError(f"{name}: {len(values)} of them for {len(prompts)} prompts")
    check_temperature(o.temperature)
    check_biases(o.logit_bias, model.config.vocab_size)
    check_stop(o)
    o.grammar = grammar_of(o, prompts, model.config.vocab_size)
    return o


def check_temperature(temperature):
    """UserError for one at which logits, divided by it, are no longer numbers."""
    if temperature and not COLDEST <= temperature <= LARGEST:
        raise UserError(
            f"temperature={temperature}: expected 0, which is greedy, or {COLDEST:g} to {LARGEST:g}"
        )


def check_biases(logit_bias, vocab_size):
    """UserError for a bias after which no probabilities are left."""
    for token, bias in logit_bias.items():
        if bias != -math.inf and not -LARGEST <= bias <= LARGEST:
            raise UserError(
                f"logit_bias: {bias} for id {token}; expected {-LARGEST:g} to {LARGEST:g}, or -inf "
                "to rule it out"
            )
    if sum(bias == -math.inf for bias in logit_bias.values()) == vocab_size:
        raise UserError("logit_bias: every id is ruled out by -inf; leave one")


def check_stop(o):
    """UserError for a stop text that can never be found."""
    for text in o.stop:
        if o.tokenizer is None:
            raise UserError(f"stop={text!r}: stop texts need a tokenizer; give it, or stop_ids")
        if not text:
            raise UserError("stop='' is empty; leave it out")
        try:
            o.tokenizer.encode(text)
        except (UserError, UnicodeError) as e:
            raise UserError(f"stop={text!r} can never be generated: {e}") from None


def grow(slot, token, logp):
    """One more token of a slot's completion, which may be its last."""
    c, o = slot.completion, slot.request.options
    c.tokens.append(token)
    c.logprobs.append(logp)
    # A stop text of m bytes lies within the last m tokens that are not empty; some are.
    tail = 2 * max((len(text.encode()) for text in o.stop), default=0) + 4
    recent = o.tokenizer.decode(c.tokens[-tail:]) if o.stop else ""
    if token in o.stop_ids or any(text in recent for text in o.stop):
        c.finish_reason = "stop"
    elif slot.matcher is not None:
        c.finish_reason = slot.matcher.accept(token, len(c.tokens) == slot.limit)
    elif len(c.tokens) == slot.limit:
        c.finish_reason = "length"
    if c.finish_reason and o.tokenizer is not None:
        c.text = o.tokenizer.decode(c.tokens[:-1] if token in o.stop_ids else c.tokens)
        found = [c.text.find(text) for text in o.stop if text in c.text]
        c.text = c.text[: min(found, default=None)]


class Request:
    """Prompts that were asked for at once, and how to go on from them."""

    def __init__(self, model, prompts, options):
        o = complete(model, prompts, options)
        self.prompts, self.options = prompts, o
        self.bias = None  # [V] if the logits are to be changed
        if o.presence_penalty or o.frequency_penalty or o.repetition_penalty != 1 or o.logit_bias:
            self.bias = torch.zeros(model.config.vocab_size, device=model.emb.weight.device)
            for token, value in o.logit_bias.items():
                self.bias[token] = value
        # How its rows choose their tokens.
        vocab_size, has_bias = model.config.vocab_size, self.bias is not None
        self.settings, self.kind = settings_of(o, vocab_size, has_bias)

    def groups(self):
        """[[index, ...], ...]: which prompts are equal, and go on from the same state."""
        with_own_state = self.options.state is not None and self.options.state["wkv"].shape[1] > 1
        equal = {}
        for p, ids in enumerate(self.prompts):
            equal.setdefault((tuple(ids), p if with_own_state else 0), []).append(p)
        return list(equal.values())


@dataclass(eq=False)
class Slot:
    """A completion that is being decoded."""

    request: Request
    number: int  # prompt index * n + sample index
    prompt_ids: list
    limit: int  # most tokens
    random: np.random.Generator
    matcher: Any = None  # of a grammar: what may come next
    completion: Completion = field(default_factory=Completion)


@dataclass
class Flight:
    """A step on its way."""

    slots: list  # that it is of, by row; None where it is of none
    receive: Any  # a function that waits for it, -> (ids, log-probabilities), lists


class Engine:
    """Decodes requests together, which come and go while it runs.

    Memory is for at most n_slots sequences. A free slot for which nothing waits is computed on and
    ignored, until most are.

    graphs: what records steps (graph.py), by default on CUDA. With it the host is a step behind: it
    sees who has stopped while the next step is computed, and throws away what that one makes of
    them. Where a step needs to know the token before, for a grammar, or the state after it is asked
    for, the host waits.
    """

    def __init__(self, model, n_slots, graphs=None):
        self.model, self.n_slots = model, n_slots
        self.native = fused.decoder(model)  # writes the state in place; None: not possible here
        self.graphs = graphs or graphs_for(model)
        self.copies = copies_for(model)
        self.queue = deque()  # (request, indices of equal prompts) that are not read yet
        self.ready = deque()  # (Slot, its prompt's logits [V], its prompt's state [L, ...])
        self.slots = [None]  # a Slot or None, as many as there are rows
        self.rows = Rows(model, n_slots if self.graphs else None)
        self.flight = None  # the step ahead, if there is one

    def submit(self, request):
        """Queue a request, for the model's weights of now; `step` starts it when slots are free."""
        self.copies.refresh()
        self.queue.extend((request, equal) for equal in request.groups())

    def cancel(self, request):
        """Forget a request; its slots are free at once."""
        self.queue = deque(entry for entry in self.queue if entry[0] is not request)
        self.ready = deque(entry for entry in self.ready if entry[0].request is not request)
        for row in self.live():
            if self.slots[row].request is request:
                self.slots[row] = None

    @property
    def state(self):
        """The state of the rows, [L, B, ...]."""
        return {key: self.rows[key] for key in STATE}

    def live(self):
        """The rows that decode."""
        return [row for row, slot in enumerate(self.slots) if slot is not None]

    @torch.no_grad()
    def step(self):
        """Another token for every slot -> [(request, number, Completion so far)]

        Where slots are free and something waits it is the first token of those that start. An empty
        list: nothing is left to do.
        """
        with self.copies.in_use():
            if started := self.fill():
                at, logits = zip(*started, strict=True)
                return self.land(self.launch(list(at), torch.stack(logits)))
            pieces = []
            while self.live() and not pieces:
                now = self.flight or self.launch()
                self.flight = self.launch() if self.is_ahead() else None
                pieces = self.land(now)
            return pieces

    def launch(self, at=None, logits=None):
        """Queue a token of every slot, or of those in the rows `at` from these logits -> Flight"""
        slots, rows = list(self.slots), self.rows
        if at is not None:
            slots = [None] * len(slots)
            for row in at:
                slots[row] = self.slots[row]
        waiting = [row for row, slot in enumerate(slots) if slot is not None]
        kind = together({slots[row].request.kind for row in waiting})
        u = np.zeros(len(slots), np.float32)
        for row in waiting:
            u[row] = slots[row].random.random(dtype=np.float32)
        rows.send("u", u)
        if kind.masked:
            rows.add("bits", -(-rows.vocab_size // 8), dtype=torch.uint8)
            rows.send("bits", bits_of([slot and slot.matcher for slot in slots], rows.vocab_size))
        index = None
        if len(waiting) < len(slots):
            index = torch.tensor(waiting, device=rows.device)
        if at is not None:
            choose(logits, rows, kind, index)
        elif self.graphs:
            self.graphs.advance(self.model, rows, kind)
        else:
            advance(self.model, self.native, rows, kind, index)
        return Flight(slots, rows.receive())

    def is_ahead(self):
        """Whether to queue a step before the one before it is known: if it is of use to a slot."""
        live = [slot for slot in self.slots if slot is not None]
        waits = any(slot.matcher or slot.request.options.return_state for slot in live)
        is_of_use = any(len(slot.completion.tokens) + 2 <= slot.limit for slot in live)
        return self.graphs is not None and is_of_use and not waits

    def land(self, flight):
        """What a step chose, for the slots that still decode -> as from `step`"""
        ids, logps = flight.receive()
        row_of = {slot: row for row, slot in enumerate(self.slots) if slot is not None}
        pieces = []
        for slot, token, logp in zip(flight.slots, ids, logps, strict=True):
            if slot not in row_of:
                continue
            row = row_of[slot]
            grow(slot, token, logp)
            if slot.completion.finish_reason:
                self.slots[row] = None
                if slot.request.options.return_state:
                    after = {key: v[:, row : row + 1].clone() for key, v in self.state.items()}
                    slot.completion.state = after
            pieces.append((slot.request, slot.number, slot.completion))
        return pieces

    def fill(self):
        """Start what waits in the free slots -> [(row, logits [V] after the prompt)]"""
        n_live, started = len(self.live()), []
        while n_live + len(started) < self.n_slots and (self.ready or self.queue):
            if not self.ready:
                self.read()
            started.append(self.ready.popleft())
        self.resize(n_live + len(started))
        free = [row for row, slot in enumerate(self.slots) if slot is None]
        for row, (slot, _, prompt_state) in zip(free, started, strict=False):
            self.slots[row] = slot
            for key, value in prompt_state.items():
                self.rows[key][:, row] = value
            if slot.request.bias is not None:
                penalties.start(self.rows, row, slot.prompt_ids, slot.request)
        if started:
            lines = np.stack([slot.request.settings for slot, _, _ in started])
            at = torch.tensor(free[: len(started)], device=self.rows.device)
            self.rows["table"][at] = torch.from_numpy(lines).to(self.rows.device)
        return [(row, logits) for row, (_, logits, _) in zip(free, started, strict=False)]

    def read(self):
        """Read what waits, as many prompts as fit in a packed pass, and make their samples ready.

        They are read when their turn comes; equal ones of a request once.
        """
        first = list(itertools.islice(self.queue, self.n_slots))
        lengths = [len(request.prompts[equal[0]]) for request, equal in first]
        n_prompts = spans(lengths, self.n_slots)[0][1]
        first = [self.queue.popleft() for _ in range(n_prompts)]
        like, states = self.model.initial_state(1), []
        for request, equal in first:
            state = state_rows(request.options.state, equal[:1], self.rows.device) or like
            states.append({key: value.to(like[key].dtype) for key, value in state.items()})
        state = {key: torch.cat([state[key] for state in states], 1) for key in like}
        prompts = [request.prompts[equal[0]] for request, equal in first]
        logits, after = prefill(self.model, prompts, state)
        for row, (request, equal) in enumerate(first):
            o, state = request.options, {key: value[:, row] for key, value in after.items()}
            for p, sample in itertools.product(equal, range(o.n)):
                random = np.random.default_rng((o.seed, o.indices[p], sample))
                number, limit = p * o.n + sample, o.max_new_tokens[p]
                matcher = o.grammar and o.grammar.begin(p)
                slot = Slot(request, number, request.prompts[p], limit, random, matcher)
                self.ready.append((slot, logits[row], state))

    def resize(self, n):
        """Have rows for n sequences: more where they are too few, fewer where most are idle."""
        width = len(self.slots)
        if width / 4 < n <= width:
            return
        width = min(self.n_slots, max(n, 2 * width)) if n > width else max(1, 2 * n)
        keep = self.live()
        index = torch.tensor(keep + [0] * (width - len(keep)), device=self.rows.device)
        self.slots = [self.slots[row] for row in keep] + [None] * (width - len(keep))
        self.rows.take(index)


def stream(model, prompts, **options):
    """Yield (number of the completion, Completion so far) at every new token.

    The options are those of `generate`. While this runs dropout is off.
    """
    model = getattr(model, "module", model)
    request = Request(model, prompts, Options(**options))
    o = request.options
    engine = Engine(model, min(o.batch_size or slots_for(model, o.memory), len(prompts) * o.n))
    engine.submit(request)
    with inference(model):
        while pieces := engine.step():
            for _, number, completion in pieces:
                yield number, completion


def generate(model, prompts, *, n=1, callback=None, progress=True, **options):
    """Sample n completions of each of P prompts, lists of ids -> P * n Completions, prompt-major.

    options: the fields of Sampling and of Options. model: with its weights of this moment; it may
    be a DDP wrapper. callback(number, Completion so far) is called at every token. progress: a bar,
    on a terminal, when it takes longer than two seconds.

    With json_schema or regex, a text fits where its finish_reason is "stop", unless a stop text cut
    it; at "length" it may be unfinished. After "Assistant:", as the chat template ends a prompt, it
    begins behind a space. The log-probabilities stay those without a grammar.
    """
    completions = [None] * (len(prompts) * n)
    hidden = None if progress else True  # None: hidden unless on a terminal
    with tqdm(total=len(completions), unit="seq", disable=hidden, delay=2) as bar:
        for number, completion in stream(model, prompts, n=n, **options):
            completions[number] = completion
            if callback is not None:
                callback(number, completion)
            if completion.finish_reason:
                bar.update()
    return completions
