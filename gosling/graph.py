"""A decode step over fixed buffers, and its recording as a CUDA graph.

`advance` is the whole step: network, penalties, grammars, temperature, top-k, top-p and min-p,
choice and log-probability of every row. It reads and writes `Rows` alone and asks the device for
nothing, so that on CUDA it is recorded once for each number of rows and each Kind of choice, and
then costs the host one launch. Elsewhere the same function is called.

Before a step the host sends random numbers and, of grammars, which tokens may come; afterwards it
receives what was chosen, by when the next step may be on its way.

B rows, V vocabulary, L layers.
"""

import copy
import functools

from gosling import penalties
from gosling.choice import COLUMNS, pick
from gosling.config import warn
from gosling.grammar import ADDED, masked
from gosling.shard import STAY_WHOLE, is_sharded
from model import packing_of
from wkv_cuda import casts
from wkv_cuda.cuda_token import in_place

import torch

STATE = ("wkv", "att_shift", "ffn_shift")  # [L, B, ...]; all else is [B, ...]


class Rows:
    """What the engine's slots are decoded from and into, tensors by name.

    ids [B], the last tokens; u [B], random numbers in [0, 1); table [B, columns] of choice.py;
    logps [B], their log-probabilities; the state [L, B, ...]; once they are needed, bits [B, V / 8]
    of grammars, a byte for eight tokens, and the counts of penalties.py.

    room: if given, there is memory for so many rows from the start, and so many or fewer lie at the
    same addresses whenever they are in use.
    """

    def __init__(self, model, room=None):
        self.n_rows, self.room = 1, room
        self.vocab_size, self.device = model.config.vocab_size, model.emb.weight.device
        self.memory, self.tensors = {}, {}  # all that there is, what is in use
        for name, x in model.zero_state(room or 1).items():
            self.tensors[name] = x.narrow(1, 0, 1)
            self.memory[name] = x if room else None
        self.add("ids", dtype=torch.long)
        self.add("u")
        self.add("table", len(COLUMNS))
        self.add("logps")
        self["table"].fill_(1.0)
        self.weights, self.tokenizers = None, []  # see penalties.py
        self.added = ADDED.to(self.device)

    def __getitem__(self, name):
        return self.tensors[name]

    def add(self, name, *shape, dtype=torch.float32):
        """Zeros [B, *shape] of this name, if there are none yet."""
        if name in self.tensors:
            return
        x = torch.zeros(self.room or self.n_rows, *shape, dtype=dtype, device=self.device)
        self.tensors[name] = x.narrow(0, 0, self.n_rows)
        self.memory[name] = x if self.room else None

    def take(self, index):
        """Go on with the rows of these numbers [B], in this order."""
        self.n_rows = len(index)
        for name, x in self.tensors.items():
            axis = 1 if name in STATE else 0
            taken = x.index_select(axis, index)
            if self.room:
                taken = self.memory[name].narrow(axis, 0, self.n_rows).copy_(taken)
            self.tensors[name] = taken

    def some(self, name, at=None):
        """The rows of the numbers `at`, or all."""
        return self[name] if at is None else self[name][at]

    def as_now(self):
        """The same memory, whatever rows are taken later on."""
        rows = copy.copy(self)
        rows.tensors = dict(self.tensors)
        return rows

    def send(self, name, values):
        """values [B, ...], an array; on CUDA the host does not wait."""
        values = torch.from_numpy(values)
        if self.device.type == "cuda":
            values = values.pin_memory()
        self[name].copy_(values, non_blocking=True)

    def receive(self):
        """-> a function that waits for what is queued, -> (ids, log-probabilities), lists"""
        chosen = [self[name].to("cpu", non_blocking=True) for name in ("ids", "logps")]
        if self.device.type != "cuda":
            lists = [x.tolist() for x in chosen]
            return lambda: lists
        event = torch.cuda.Event()
        event.record()

        def wait():
            event.synchronize()
            return [x.tolist() for x in chosen]

        return wait


def advance(network, native, rows, kind, at=None):
    """Another token for every row, or chosen for those with the numbers `at` alone."""
    logits = decode(network, native, rows["ids"], {key: rows[key] for key in STATE})
    choose(logits if at is None else logits[at], rows, kind, at)


def decode(model, native, ids, state):
    """Another token for each row: ids [B] -> logits [B, V]; the state is written in place."""
    if native is not None:
        return native(ids, state).to(state["att_shift"].dtype)
    if is_sharded(model):  # its processes gather weights when the whole is called
        logits, after = model(ids[:, None], state)
        for key in STATE:
            state[key].copy_(after[key])
        return logits[:, 0]
    x = model.emb(ids[:, None]).to(model.compute_dtype or model.emb.weight.dtype)
    v_first, packing = None, packing_of(None, ids.device)
    for layer, block in enumerate(model.blocks):
        before = [state[key][layer] for key in STATE]
        with in_place():
            x, v_first, *after = block(x, v_first, *before, packing)
        for old, new in zip(before, after, strict=True):
            if new is not old:
                old.copy_(new)
    return model.head(model.ln_out(x))[:, 0]


def choose(logits, rows, kind, at=None):
    """logits [B, V] of all rows, or of those with the numbers `at` [B]: ids, log-probabilities and
    counts go to the rows."""
    table, changed = rows.some("table", at), None
    if kind.penalised:
        changed = penalties.apply(logits.float(), rows, table, at)
    if kind.masked:
        scores = logits if changed is None else changed
        changed = masked(scores, rows.some("bits", at), rows.added)
    ids, logps = pick(logits, rows.some("u", at), table, kind, changed)
    if kind.penalised:
        penalties.add(ids, rows, table, at)
    if at is None:
        rows["ids"].copy_(ids)
        rows["logps"].copy_(logps)
    else:
        rows["ids"][at], rows["logps"][at] = ids, logps


# ----------------------------------------------------------------------------------------------
# recording


def record_on_cuda(step, pool):
    """-> a torch.cuda.CUDAGraph of a step, of which nothing is computed yet"""
    recorded = torch.cuda.CUDAGraph()
    # Other threads, NCCL's among them, may do on CUDA what a recording forbids.
    recording = torch.cuda.graph(recorded, pool=pool, capture_error_mode="thread_local")
    # One that fails does not come back to the stream that it left.
    with torch.cuda.stream(torch.cuda.current_stream()), recording:
        step()
    return recorded


class Graphs:
    """Steps that were recorded, by what they depend on.

    The first step of a sort runs as it is, which also sets up libraries; the second is recorded.
    If that fails, one line says so, and what is not recorded goes on as it is.
    """

    def __init__(self, record=record_on_cuda, new_pool=torch.cuda.graph_pool_handle):
        self.record, self.recorded, self.seen, self.has_failed = record, {}, set(), False
        self.pool = new_pool()  # memory, which they may share: one runs at a time

    def advance(self, network, rows, kind):
        kind = kind.without_asking(rows.vocab_size)
        key = (kind, rows.n_rows, len(rows.tokenizers))
        step = functools.partial(advance, network, None, rows.as_now(), kind)
        if key in self.seen and key not in self.recorded and not self.has_failed:
            try:
                self.recorded[key] = self.record(step, self.pool)
            except RuntimeError as e:
                self.has_failed = True
                warn(f"decoding without a CUDA graph, which could not be recorded: {first_line(e)}")
        self.seen.add(key)
        if key in self.recorded:
            self.recorded[key].replay()
        else:
            step()


def first_line(error):
    return str(error).strip().split("\n")[0][:200]


def graphs_for(model):
    """Graphs where they are possible: on CUDA, all weights in one place. Else None."""
    on_cuda = model.emb.weight.device.type == "cuda"
    return Graphs() if on_cuda and not is_sharded(model) else None


# ----------------------------------------------------------------------------------------------
# weights


def copies_for(model):
    """wkv_cuda.casts.Copies of the weights that a step would cast anew at every token.

    None of those that are read as they are: of the embedding rows are read, and then cast.
    """
    dtype, weights = model.compute_dtype, []
    for name, p in model.named_parameters():
        is_read_so = name.endswith(STAY_WHOLE) or name.startswith(("emb.", "score.", "tuned."))
        if dtype not in (None, p.dtype) and not is_read_so and not is_sharded(model):
            weights.append(p)
    return casts.Copies(weights, dtype)
