"""Counting the memory of a training step without taking it, and what its cards send each other.

The real network runs forward and backward on tensors that have shapes and no content; PyTorch's
fully_shard runs with it, among processes that are not there. `count` is what bench/memory.py calls.
"""

import collections
import contextlib
import unittest.mock
import warnings
import weakref
from dataclasses import dataclass
from types import SimpleNamespace

from gosling import shard
from gosling.optimizer import block_size
from model import RWKV, RWKVConfig
from wkv_cuda import casts, fused

import torch
import torch.distributed as dist
from torch._subclasses import FakeTensorMode
from torch.distributed.tensor import DTensor
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

# The official files: layers, width, and the ranks of w, a, v and g, which follow no one rule. As in
# the table of RWKV-Vibe/RWKV-LM-V7's README.
OFFICIAL = {
    "0b1": (12, 768, 64, 64, 32, 128),
    "0b4": (24, 1024, 64, 64, 32, 128),
    "1b5": (24, 2048, 96, 96, 64, 256),
    "2b9": (32, 2560, 96, 96, 64, 320),
    "7b2": (32, 4096, 128, 128, 96, 480),
    "13b3": (61, 4096, 192, 192, 128, 384),
}
LORA = dict(r=32)


def official(name, vocab=65536):
    """The RWKVConfig of an official size."""
    n_layer, n_embd, w, a, v, g = OFFICIAL[name]
    ranks = dict(decay_rank=w, iclr_rank=a, value_rank=v, gate_rank=g)
    return RWKVConfig("x070", n_layer, n_embd, vocab, **ranks)


@dataclass
class Layout:
    """How a run is laid out; what a flag of bench/memory.py says has its name."""

    tune: str = "full"
    dtype: torch.dtype = torch.bfloat16  # of frozen weights and of the computation
    grad_cp: bool = False
    tokens: int = 1024  # of a backward pass
    accumulation: int = 1  # backward passes of a step
    slots: int = 0  # sequences that are decoded together
    optim: str = "adamw"
    step_in_backward: bool = False
    gpus: int = 1
    shard: str = "none"
    cpu_offload: bool = False
    on_a_gpu: bool = True  # False: fewer rows of the head at once, and gloo in place of NCCL


@dataclass
class Count:
    """Bytes of one card, by what they are for."""

    peak: dict  # while most is alive; activations are what belongs to nothing else
    after: dict  # when the backward pass is over
    sent: dict  # per step; as many are received
    trained: int  # parameters
    all: int  # parameters


@dataclass(eq=False)
class Record:
    kind: str
    size: int = 0


class Peak(TorchDispatchMode):
    """Follows the tensors made inside. `kind` is what new ones are counted as.

    .alive, .at_peak: bytes by kind, now and when most of them were alive. What is in `elsewhere`
    adds nothing to the peak. .sent: bytes that one of `cards` cards sends, by what for. gloo works
    on a copy of what it gathers and reduces.
    """

    def __init__(self, cards=1, elsewhere=(), gloo=False):
        super().__init__()
        self.cards, self.elsewhere, self.gloo = cards, elsewhere, gloo
        self.kind, self.phase = "parameters", "forward"
        self.alive, self.at_peak, self.sent = (collections.Counter() for _ in range(3))
        self.most, self.reduced = 0, None
        self.records = WeakIdKeyDictionary()  # storage -> Record

    def __enter__(self):
        resize = torch.UntypedStorage.resize_

        def resize_(storage, size):
            resize(storage, size)
            self.see(storage)

        # fully_shard lets go of gathered weights by making their storage empty.
        self.patch = unittest.mock.patch.object(torch.UntypedStorage, "resize_", resize_)
        self.patch.start()
        return super().__enter__()

    def __exit__(self, *error):
        self.patch.stop()
        return super().__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.see(storage_of(x))
        if func.namespace in ("fsdp", "c10d"):
            self.see_exchange(func._opname, args, kwargs or {}, out)
        return out

    def see(self, storage, kind=None):
        """A tensor's memory is there, perhaps of another size or kind than before."""
        record = self.records.get(storage)
        if record is None:
            record = self.records[storage] = Record(self.kind)
            weakref.finalize(storage, self.change, record, size=0)
        self.change(record, kind, storage.nbytes())
        return record

    def change(self, record, kind=None, size=None):
        self.alive[record.kind] -= record.size
        record.kind = kind or record.kind
        record.size = record.size if size is None else size
        self.alive[record.kind] += record.size
        here = sum(size for kind, size in self.alive.items() if kind not in self.elsewhere)
        if here > self.most:
            self.most, self.at_peak = here, self.alive.copy()

    def see_exchange(self, name, args, kwargs, out):
        """An operation of fully_shard's, or one that sends."""
        share = (self.cards - 1) / self.cards  # of a ring: all but one's own part
        if name == "all_gather_copy_in":
            self.see(storage_of(out[1]), "gathered")
        elif name in ("split_with_sizes_copy", "chunk_cat"):
            for x in tree_leaves(kwargs["out"]):
                self.see(storage_of(x), "gathered")
        elif name == "_allgather_base_":
            self.sent[f"all-gather, {self.phase}"] += share * args[0].nbytes
            self.see_copy(args[0].nbytes)
        elif name == "_reduce_scatter_base_":
            self.sent["reduce-scatter"] += share * args[1].nbytes
            if self.reduced:  # what was reduced before has gone where gradients are
                self.change(self.reduced, "gradients")
            on_card = "gathered" if "gradients" in self.elsewhere else "gradients"
            self.reduced = self.see(storage_of(args[0]), on_card)
            self.see_copy(args[1].nbytes)

    def see_copy(self, size):
        """What gloo holds while it sends."""
        copy = Record("gathered")
        for there in (size, 0) if self.gloo else ():
            self.change(copy, size=there)

    def turn(self, kind, into):
        """Count all that is alive of one kind as another."""
        for record in list(self.records.values()):
            if record.kind == kind:
                self.change(record, into)


def storage_of(x):
    return (x._local_tensor if isinstance(x, DTensor) else x).untyped_storage()


# ----------------------------------------------------------------------------------------------
# a model with shapes and no content


def meta_model(c, layout):
    """The network on the meta device: shapes alone."""
    with torch.device("meta"):
        model = RWKV(c)
    for p in model.parameters():
        p.data = p.data.to(layout.dtype)
    model.set_tune(layout.tune, **(LORA if layout.tune == "lora" else {}))
    model.compute_dtype, model.grad_cp = layout.dtype, layout.grad_cp
    return model


def to_fake(model):
    """Its parameters become those of the FakeTensorMode that is on."""
    for module in model.modules():
        for name, p in list(module.named_parameters(recurse=False)):
            fake = torch.empty(p.shape, dtype=p.dtype)
            setattr(module, name, torch.nn.Parameter(fake, requires_grad=p.requires_grad))


@contextlib.contextmanager
def processes_not_there(world):
    """`with processes_not_there(64) as mesh:` this is rank 0, and what it sends goes nowhere."""
    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "FSDP2-wrapped module")
            yield dist.init_device_mesh("cpu", (world,))
    finally:
        dist.destroy_process_group()


def to_shares(model, layout, mesh):
    """As the scripts do it; with cpu_offload, shares are told apart by their kind and not moved."""
    dtype = None if layout.dtype == torch.float32 else layout.dtype
    for module in (*model.blocks, model):
        shard.to_shares(module, model, mesh, dtype, SimpleNamespace(cpu_offload=False))


def rows_on_a_gpu(h, weight):
    """fused.ScoreTokens.rows_at_a_time, wherever the tensors are."""
    return max(256, 2**26 // len(weight))


def rows_on_a_cpu(h, weight):
    return max(256, 2**22 // len(weight))


# ----------------------------------------------------------------------------------------------
# the count


def count(c, layout):
    """RWKVConfig, Layout -> Count of a training step"""
    is_sharded = layout.shard == "fsdp" and layout.gpus > 1
    on_host = ("parameters", "optimiser", "gradients") if layout.cpu_offload else ()
    model = meta_model(c, layout)
    rows = staticmethod(rows_on_a_gpu if layout.on_a_gpu else rows_on_a_cpu)
    with contextlib.ExitStack() as stack:
        enter = stack.enter_context
        enter(unittest.mock.patch.object(fused.ScoreTokens, "rows_at_a_time", rows))
        if is_sharded:
            mesh = enter(processes_not_there(layout.gpus))
        enter(FakeTensorMode())
        memory = enter(Peak(layout.gpus, on_host, gloo=not layout.on_a_gpu))
        to_fake(model)
        if is_sharded:
            to_shares(model, layout, mesh)
        trained = [p for p in model.parameters() if p.requires_grad]
        memory.kind = "optimiser"
        moments = [m for p in trained for m in moments_of(local(p), layout, c.n_embd)]
        memory.kind = "activations"
        memory.most = 0  # that of the start does not count
        sent = run_step(model, memory, layout, is_sharded)
        after = dict(memory.alive)
        del moments
    n_trained = sum(p.numel() for p in trained)
    whole = sum(p.nbytes for p in trained if not isinstance(p, DTensor))
    peak, twice = dict(memory.at_peak), 2 * (layout.gpus - 1) / layout.gpus  # of a ring
    if layout.gpus > 1 and whole:
        sent["all-reduce"] = twice * whole
    if layout.gpus > 1 and not is_sharded:
        peak["buckets"] = whole  # DDP's copy of the gradients
    if layout.slots:
        state = c.n_layer * c.n_embd * (4 * c.head_size + 2 * layout.dtype.itemsize)
        peak["states"] = 2 * layout.slots * state
    return Count(peak, after, sent, n_trained, sum(p.numel() for p in model.parameters()))


def moments_of(p, layout, n_embd):
    """What AdamW keeps of a parameter; torchao keeps small tensors in float32."""
    size = block_size(n_embd)
    if layout.optim == "adamw" or p.numel() < 4096 or p.numel() % size:
        return [torch.empty(p.shape, dtype=p.dtype) for _ in range(2)]
    codes = [torch.empty(p.shape, dtype=torch.uint8) for _ in range(2)]
    return codes + [torch.empty(p.numel() // size) for _ in range(2)]


def local(p):
    return p._local_tensor if isinstance(p, DTensor) else p


def run_step(model, memory, layout, is_sharded):
    """The backward passes of a step -> bytes sent in it, by what for"""

    def is_a_gradient(p):
        memory.see(p.grad.untyped_storage(), "gradients")
        if layout.step_in_backward:
            p.grad = None

    for p in model.parameters():
        if p.requires_grad and not isinstance(p, DTensor):
            p.register_post_accumulate_grad_hook(is_a_gradient)
    idx = torch.zeros(1, layout.tokens, dtype=torch.long)
    sent = collections.Counter()
    # One pass stands for all but the last, which alone reduces.
    for times, is_last in ((layout.accumulation - 1, False), (1, True)):
        if not times:
            continue
        if is_sharded:
            model.set_requires_gradient_sync(is_last)
        memory.sent.clear()
        memory.phase = "forward"
        scores, _ = model(idx, targets=idx)
        for module in model.modules():
            if module in casts.of_modules:  # a block or the head, if float32 weights have copies
                for copy in casts.of_modules[module].copies:
                    memory.see(copy.untyped_storage(), "copies")
        memory.phase = "backward"
        scores.logps.sum().backward()
        del scores
        memory.turn("activations", "gradients")  # what is kept for the next pass
        for what, size in memory.sent.items():
            sent[what] += times * size
    if memory.reduced:
        memory.change(memory.reduced, "gradients")
    return dict(sent)
