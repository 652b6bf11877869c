"""torch.compile against the network as it is: a training step, a forward pass, one token.

python bench/compile.py          # RWKV-7, 6 layers of width 384, one thread, process CPU time
python bench/compile.py --count --n_embd=128      # operators of a layer, and kernels with --compile
"""

import contextlib
import functools
import importlib.util
import re
import sys
import time
import unittest.mock
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
from torch._inductor.utils import run_and_get_code
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gosling import config
from gosling.compiled import compile_blocks
from model import RWKV, RWKVConfig
from wkv_cuda import cpu, fused

import timer


@dataclass
class Config:
    count: bool = False  # count, in place of timing
    version: str = "x070"  # or x060
    n_layer: int = 6  # layers
    n_embd: int = 384  # width
    vocab: int = 4096  # vocabulary
    ctx: int = 256  # tokens of a row
    bsz: int = 4  # rows
    rounds: int = 9  # counted runs of each
    threads: int = 1  # CPU threads


def train(model, network, ids):
    """Loss and gradients, without the optimiser."""
    scores, _ = network(ids[:, :-1], targets=ids[:, 1:])
    (-scores.logps.mean()).backward()
    model.zero_grad()


@torch.no_grad()
def forward(network, ids):
    network(ids)


@torch.no_grad()
def tokens(network, ids, state):
    """One token a call, 16 calls."""
    for t in range(16):
        _, state = network(ids[:1, t : t + 1], state)


# ----------------------------------------------------------------------------------------------
# counted: float32 weights that compute in bfloat16, as on a GPU

NO_KERNEL = ("empty", "view", "detach", "alias", "lift", "promote_types")


class Operators(TorchDispatchMode):
    """Counts the operators that compute something."""

    def __init__(self):
        super().__init__()
        self.n = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.n += not func.is_view and not any(word in str(func) for word in NO_KERNEL)
        return func(*args, **(kwargs or {}))


def network(cfg, n_layer):
    model = RWKV(RWKVConfig(cfg.version, n_layer, cfg.n_embd, cfg.vocab))
    model.compute_dtype = torch.bfloat16
    return model


def jit(f=None, **options):
    """In place of triton.jit where there is no Triton: kernels are not run."""
    return f or jit


def ceiling_of(a, b):
    return -(-a // b)


def between_without_kernels():
    """wkv_cuda/between.py, whose kernels are only counted: Triton need not be installed."""
    stand_ins = {}
    if importlib.util.find_spec("triton") is None:
        language = SimpleNamespace(constexpr=int)
        triton = SimpleNamespace(jit=jit, cdiv=ceiling_of, language=language)
        stand_ins = {"triton": triton, "triton.language": language}
    sys.modules.update(stand_ins)
    try:
        from wkv_cuda import between, shift  # noqa: F401
    finally:
        for name in stand_ins:
            del sys.modules[name]
    return between


def operators(cfg, n_layer, ids, in_triton=False, **options):
    """-> operators of a forward, of a backward, as a GPU takes them: in PyTorch, or in Triton what
    lies between products"""
    model = network(cfg, n_layer)
    train(model, model, ids)
    form = between_without_kernels() if in_triton else None
    counter = Operators()

    def launch(*args, **options):
        counter.n += 1

    with contextlib.ExitStack() as stack:
        patch = unittest.mock.patch.object
        stack.enter_context(patch(fused, "one_pass", lambda x, head_size=64: form))
        stack.enter_context(patch(cpu, "score_rows", lambda *args: None))
        if form:
            stack.enter_context(patch(form, "launch", launch))
        stack.enter_context(counter)
        scores, _ = model(ids[:, :-1], targets=ids[:, 1:], **options)
        forward = counter.n
        scores.logps.mean().backward()
    return forward, counter.n - forward


def of_a_layer(cfg, ids, **options):
    """-> operators of a forward, of a backward: what the third layer adds"""
    two, three = operators(cfg, 2, ids, **options), operators(cfg, 3, ids, **options)
    return dict(forward=three[0] - two[0], backward=three[1] - two[1])


def kernels(cfg, ids):
    """-> what the compiled second block calls: {"forward": {"fused", "products"}, "backward"}"""
    model = network(cfg, 2)
    compile_blocks(model, SimpleNamespace(compile=True))
    _, codes = run_and_get_code(train, model, model, ids)
    found = {}
    for code in codes:
        body = code[code.index("def call(") :]
        name = "backward" if "_backward" in body else "forward"
        fused_calls = len(re.findall(r"\bcpp_fused\w*\(", body))
        products = len(re.findall(r"extern_kernels\.", body))
        # Of two blocks the second, which has the value residual, has more products in RWKV-7.
        if products >= found.get(name, {"products": 0})["products"]:
            found[name] = dict(fused=fused_calls, products=products)
    return found


def count(cfg):
    ids = torch.randint(0, cfg.vocab, (cfg.bsz, cfg.ctx + 1))
    plain, triton = of_a_layer(cfg, ids), of_a_layer(cfg, ids, in_triton=True)
    found = dict(operators=plain, triton=triton, kernels=kernels(cfg, ids))
    timer.report("compile", **vars(cfg), **found)


def main(cfg):
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(0)
    fused.build("cpu")
    if cfg.count:
        count(cfg)
        return
    model = RWKV(RWKVConfig(cfg.version, cfg.n_layer, cfg.n_embd, cfg.vocab))
    compiled = torch.compile(model)
    ids = torch.randint(0, cfg.vocab, (cfg.bsz, cfg.ctx + 1))
    start = time.perf_counter()
    train(model, compiled, ids)
    compile_s = round(time.perf_counter() - start)
    ratios, ms = {}, {}
    for name, work, args in (
        ("train", functools.partial(train, model), (ids,)),
        ("forward", forward, (ids[:, :-1],)),
        ("token", tokens, (ids, model.zero_state(1))),
    ):
        sides = {
            "eager": functools.partial(work, model, *args),
            "compiled": functools.partial(work, compiled, *args),
        }
        seconds = timer.interleaved(sides, cfg.rounds, warm_ups=2)
        ratios[name] = timer.median(seconds["eager"] / seconds["compiled"], 2)
        ms[name] = {side: timer.median(s * 1e3, 1) for side, s in seconds.items()}
    timer.report("compile", **vars(cfg), compile_s=compile_s, ms=ms, ratios=ratios)


if __name__ == "__main__":
    main(config.read_flags(Config))
