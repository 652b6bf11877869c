"""The recurrence on tensor cores, 16 tokens at a time: wkv6_chunk.cu and wkv7_chunk.cu.

bf16 in and out, head size 64, compute capability 8.0 and newer. Products are of fp16 numbers,
scaled by powers of two and summed in fp32; the carried state is fp32. For the backward pass an
fp16 state per 32 tokens is kept, or per 16 (keep). No atomics, so the same inputs give the same
bits. Built together with the sequential kernels (cuda_seq.py), which take everything else.
"""

import functools
import sys

import torch
import torch.nn.functional as F

from . import chunked, cuda_seq, native

DEVICE, HEAD_SIZES, DTYPES = "cuda", (64,), (torch.bfloat16,)
LOGW_DTYPES = (torch.float32, torch.bfloat16)
SAVED_STATE = 64 * 64 + 8  # halves: STATE in chunk.cuh
RECORD = 16 * 64 // 2 + 16  # floats: in wkv7_spans.cuh


def wkv(version, inputs, state, cu_seqlens):
    """log w in fp32 or bf16; WKV-7 counts one below -14 as -14, a factor of 1e-6."""
    return native.run(_ops[version], inputs, state, cu_seqlens, LOGW_DTYPES)


@torch.compiler.assume_constant_result
def unavailable():
    """None if the kernels can be used here, else what is missing; the first call builds them."""
    if missing := cuda_seq.unavailable():
        return missing
    major, minor = torch.cuda.get_device_capability()
    if major < 8:
        name = torch.cuda.get_device_name()
        return f"{name} has compute capability {major}.{minor}, the tensor-core kernels need 8.0"
    return trial("cuda")


@functools.cache
def trial(device):
    """None if outputs and gradients of a small case are the PyTorch form's, else a line.

    A card proves itself once.
    """
    g = torch.Generator().manual_seed(0)
    r, k, v, x, z = (torch.randn(1, 70, 1, 64, generator=g) for _ in range(5))
    kappa, logw = F.normalize(x, dim=-1), -0.6 * z.sigmoid()
    state = torch.randn(1, 1, 64, 64, generator=g)
    for version, rest in ((7, (-kappa, kappa * x.sigmoid())), (6, (x[0, 0],))):
        results = []
        for form, dtype in ((wkv, torch.bfloat16), (chunked.wkv, torch.float32)):
            with torch.enable_grad():
                inputs = [t.to(device, torch.bfloat16).to(dtype) for t in (r, logw, k, v, *rest)]
                inputs = [t.detach().clone().requires_grad_() for t in (*inputs, state.to(device))]
                y, last = form(version, inputs[:-1], inputs[-1], None)
                grads = torch.autograd.grad(y.float().square().sum() + last.square().sum(), inputs)
            results.append([t.detach().float() for t in (y, last, *grads)])
        pairs = zip(*results, strict=True)
        worst = max(float((kernel - plain).norm() / plain.norm()) for kernel, plain in pairs)
        if not worst < 2e-2:
            return (
                f"wkv{version} is off by {worst:.1e} on this card; please report it, with its name "
                "and driver"
            )
    return None


def are_few(S, H, total):
    """Whether S sequences of H heads leave much of 132 processors idle, three blocks on each."""
    return 2 * S * H <= 3 * 132 and total >= 1024 * S


def span(S, H, total):
    """Tokens of a span, of which a long sequence has several at once (chunk.cuh); 0 for none.

    Where sequences and heads are few, all are cut, so that a card is full. Else those are that are
    much longer than the others: how long each is, the host does not know. Not from the card at
    hand: the same inputs give the same bits everywhere.
    """
    if total < 1024 * S and total < 8192:
        return 0
    if are_few(S, H, total):
        spans = 3 * 132 // max(S * H, 1)
        tokens = -(-total // (S * spans))
    else:
        tokens = max(3 * total // S, total * H // (2 * 132))
    tokens = max(-(-tokens // native.CHUNK) * native.CHUNK, 512)
    return tokens if tokens < total else 0


def keep(version, r, state, save):
    """(shape, dtype) of what the backward needs of the forward.

    The state before every 16 or 32 tokens. Between spans, T and D of each border. Of WKV-7 also Q
    of the tokens from each border to the next (wkv7_spans.cuh), where sequences and heads are few;
    else the backward makes Q again.
    """
    (S, H, N, _), total = state.shape, r.shape[0]
    tokens = span(S, H, total)
    borders = total // tokens if tokens else 0
    keeps_q = version == 7 and save and borders > 0 and are_few(S, H, total)
    every = 16 if keeps_q else native.CHUNK
    slots = total // every + S if save else 0
    kept = [((slots, H, SAVED_STATE), torch.float16), ((borders, H, 2, N, N), torch.float32)]
    if version == 7:
        kept.append(((borders if keeps_q else 0, H, tokens // 16 * RECORD), torch.float32))
    return kept


def scratch(state, kept):
    """Memory for the backward: a state for each border between spans, and Q if it is not kept."""
    memory = [kept[1].new_empty(len(kept[1]), *state.shape[1:])]
    if len(kept) == 3:
        borders = len(kept[1]) - len(kept[2])
        memory.append(kept[2].new_empty(borders, *kept[2].shape[1:]))
    return memory


def parts(state, kept):
    """How many blocks a head has in the backward: one for each sequence and border."""
    return len(state) + len(kept[1])


def launch(function, *args):
    *tensors, S, H, total, _ = args
    cuda_seq.launch(
        function, *tensors, S, H, total, native.DTYPES[tensors[1].dtype], span(S, H, total)
    )


_ops = {
    version: native.register(
        f"wkv{version}_chunk",
        version,
        sys.modules[__name__],
        functools.partial(keep, version),
        scratch,
        parts,
        n_kept={6: 2, 7: 3}[version],
    )
    for version in (6, 7)
}
