"""RWKV-6 (x060, "Finch") and RWKV-7 (x070, "Goose"), with official names and shapes of weights.

  RWKV-7: https://arxiv.org/abs/2503.14456      RWKV-6: https://arxiv.org/abs/2404.05892

A transformer's block with both halves replaced. Time mixing stands where attention does: a head
does not keep all past keys and values but one matrix S [N, N] of fixed size, into which each token
writes its value under its key, and from which it reads with its receptance r, the query
(`TimeMix7`). Channel mixing stands where the MLP does (`ChannelMix7`). Both see the token before as
well (`token_shift`, `mix`), and there are no positions: order is in the recurrence.

Glossary of shapes
  B rows of a batch      T tokens of a row      V vocabulary      C width, n_embd      L layers
  N head size, 64        H heads, C / N
  D documents packed end to end in one row (B = 1, cu_seqlens [D + 1])
  idx, targets [B, T]    logits [B, T, V]       r k v w a g [B, T, C] or, by head, [B, T, H, N]
  state: {"wkv": [L, B, H, N, N] float32, rows = value, columns = key;
          "att_shift", "ffn_shift": [L, B, C]}, with D in place of B when packed. It is a value:
          index it along B, repeat it, save it, differentiate through it. Feeding a sequence whole,
          in pieces or token by token gives the same numbers.

Parameters may be float32 while the network computes in bfloat16: `model.compute_dtype` is what
activations are in, and every weight is cast where it is used (wkv_cuda/casts.py). The decay and the
state stay float32.
"""

import math
import re
from dataclasses import dataclass
from typing import NamedTuple

from wkv_cuda import casts, fused, packed, wkv6, wkv7
from wkv_cuda.casts import cast

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# The first layer has no layer below to take values from, so these never get a gradient.
NEVER_TRAINED = ("blocks.0.att.v0", "blocks.0.att.v1", "blocks.0.att.v2")


@dataclass
class RWKVConfig:
    version: str = "x070"  # x060 = RWKV-6, x070 = RWKV-7
    n_layer: int = 12
    n_embd: int = 768
    vocab_size: int = 65536
    head_size: int = 64
    dim_ffn: int = 0  # width of the channel mix; this and all below: 0 = upstream's rule
    decay_rank: int = 0  # rank of the decay's low-rank pair: w1/w2, time_decay_w1/w2
    iclr_rank: int = 0  # x070: a1/a2, the in-context learning rate
    value_rank: int = 0  # x070: v1/v2, the value residual
    gate_rank: int = 0  # x070: g1/g2
    mix_rank: int = 0  # x060: time_maa_w1/w2, each of its five parts

    def __post_init__(self):
        if self.version not in ("x060", "x070"):
            raise ValueError(f"version={self.version!r}: expected x060 or x070")
        for name in ("n_layer", "n_embd", "head_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected a number above 0")
        C, N = self.n_embd, self.head_size
        if C % N:
            raise ValueError(
                f"n_embd={C} is not a multiple of head_size={N}; try n_embd={math.ceil(C / N) * N}"
            )

        # Upstream's rule for new models; files carry their own ranks.
        sizes = dict(dim_ffn=int(3.5 * C) // 32 * 32, decay_rank=64, mix_rank=32)
        if self.version == "x070":
            factors = dict(decay_rank=2.5, iclr_rank=2.5, value_rank=1.7, gate_rank=5.0)
            sizes = {k: max(32, 32 * round(f * math.sqrt(C) / 32)) for k, f in factors.items()}
            sizes["dim_ffn"] = 4 * C
        for name, size in sizes.items():
            setattr(self, name, getattr(self, name) or size)


class TokenScores(NamedTuple):
    logps: torch.Tensor  # [B, T] log-probability of each target
    entropy: torch.Tensor  # [B, T] of the distribution at each position, nats
    hits: torch.Tensor  # [B, T] bool: the target is the likeliest token


# ----------------------------------------------------------------------------------------------
# layers


class Linear(nn.Linear):
    """y = W x, without a bias."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)

    def reset_parameters(self):  # nn.Linear would draw numbers; init_parameter does it, by name
        pass

    def forward(self, x):
        return fused.linear(x, cast(self.weight, x.dtype))

    def whole_weight(self):
        """What forward multiplies with, [out, in]; with an adapter it is more than the weight."""
        return self.weight


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        weight, bias = cast(self.weight, x.dtype), cast(self.bias, x.dtype)
        return F.layer_norm(x, self.normalized_shape, weight, bias, self.eps)


def matrix(*shape):
    return nn.Parameter(torch.empty(*shape))


def vector(C):
    return matrix(1, 1, C)


def low_rank(x, down, up, activation=None):
    """activation(x @ down) @ up; these pairs are stored [in, rank], [rank, out]."""
    h = fused.linear(x, cast(down, x.dtype).mT)
    if activation is not None:
        h = activation(h)
    return fused.linear(h, cast(up, x.dtype).mT)


class Packing(NamedTuple):
    """Where D documents lie that are packed end to end, worked out once per forward."""

    cu_seqlens: packed.CuSeqlens  # [D + 1] on the host and on the device
    filled: torch.Tensor  # indices of the documents with at least one token
    first: torch.Tensor  # their first tokens
    last: torch.Tensor  # their last tokens


def packing_of(cu_seqlens, idx):
    """cu_seqlens [D + 1] of idx [1, T] -> Packing; None, for B rows of one length -> one of None.

    The device copies it while the host goes on.
    """
    if cu_seqlens is None:
        return Packing(None, None, None, None)
    borders = packed.borders_of(cu_seqlens)
    cu_seqlens = packed.cu_seqlens_of(borders, *idx.shape, idx.device)
    return Packing(cu_seqlens, *packed.filled_documents(borders, idx.device))


def pieces(T, cu_seqlens, chunk_len):
    """Yield (a, b, cu_seqlens of tokens a..b) for each chunk of a row of T tokens; 0 = one chunk.

    A document that a chunk holds nothing of has length 0 there and hands its state through.
    """
    if not chunk_len:
        yield 0, T, cu_seqlens
        return
    borders = None if cu_seqlens is None else packed.borders_of(cu_seqlens)
    for a in range(0, T, chunk_len):
        b = min(a + chunk_len, T)
        yield a, b, borders and [min(max(border, a), b) - a for border in borders]


def token_shift(x, shift, packing):
    """x [B, T, C] and the input before the first token, shift [B or D, C]
    -> (x of the token before each, x_prev [B, T, C], the new shift)."""
    shift = shift.to(x.dtype)  # a state may come from a run in another precision
    in_one_pass = fused.token_shift(x, shift, packing.cu_seqlens)
    if in_one_pass:
        return in_one_pass
    if packing.cu_seqlens is None:
        # A copy: a view would keep all of x, of every layer, until the state is put together.
        return torch.cat([shift[:, None], x[:, :-1]], 1), x[:, -1].clone()
    x_prev = torch.cat([x[:, :1], x[:, :-1]], 1)
    x_prev = x_prev.index_copy(1, packing.first, shift[None, packing.filled])
    return x_prev, shift.index_copy(0, packing.filled, x[0, packing.last])


class TimeMix7(nn.Module):
    """For each head, with * by element, k' a row, and every vector computed from its own mix of x
    with the token before:

      S_t = S_{t-1} (diag(w_t) - kappa_t (a_t * kappa_t)') + v_t k_t'
      y_t = S_t r_t
      out = W_o (g * (norm(y) + (r . (r_k * k)) v))

    w decays each key channel; what S holds under the unit key kappa is replaced at the rate a.
    """

    def __init__(self, c):
        super().__init__()
        C, self.H, self.N = c.n_embd, c.n_embd // c.head_size, c.head_size
        self.x_r, self.x_w, self.x_k = vector(C), vector(C), vector(C)
        self.x_v, self.x_a, self.x_g = vector(C), vector(C), vector(C)
        self.w0, self.w1, self.w2 = vector(C), matrix(C, c.decay_rank), matrix(c.decay_rank, C)
        self.a0, self.a1, self.a2 = vector(C), matrix(C, c.iclr_rank), matrix(c.iclr_rank, C)
        self.v0, self.v1, self.v2 = vector(C), matrix(C, c.value_rank), matrix(c.value_rank, C)
        self.g1, self.g2 = matrix(C, c.gate_rank), matrix(c.gate_rank, C)
        self.k_k, self.k_a, self.r_k = vector(C), vector(C), matrix(self.H, self.N)
        self.receptance, self.key = Linear(C, C), Linear(C, C)
        self.value, self.output = Linear(C, C), Linear(C, C)
        self.ln_x = LayerNorm(C)

    def forward(self, x, v_first, shift, wkv, packing):
        """x [B, T, C] -> (out [B, T, C], v_first, shift, wkv); v_first: the first layer's values,
        None in that layer."""
        B, T, C = x.shape
        x_prev, shift = token_shift(x, shift, packing)
        # x_r = x + (x_prev - x) * self.x_r, and so on
        x_r, x_w, x_k, x_v, x_a, x_g = fused.mix(
            x, x_prev, self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g
        )
        r = self.receptance(x_r)
        k = self.key(x_k)
        v = self.value(x_v)
        w = low_rank(x_w, self.w1, self.w2, torch.tanh)
        a = low_rank(x_a, self.a1, self.a2)
        g = low_rank(x_g, self.g1, self.g2, torch.sigmoid)
        v_gate = None if v_first is None else low_rank(x_v, self.v1, self.v2)
        # log w = -exp(-1/2) sigmoid(w0 + w), so that the decay w is in (0.545, 1)
        # a = sigmoid(a0 + a), the in-context learning rate
        # v = v + (v_first - v) * sigmoid(v0 + v_gate), the value residual, not in the first layer
        # kappa = k * k_k, each head divided by its length: the removal key
        # k = k * (1 + (a - 1) * k_a)
        logw, k, v, minus_kappa, kappa_a = fused.gates7(
            *(k, v, v_first, w, a, v_gate),
            *(self.w0, self.a0, self.v0, self.k_k, self.k_a, self.N),
        )
        v_first = v if v_first is None else v_first

        by_head = (B, T, self.H, self.N)
        r, logw, k, v = (t.view(by_head) for t in (r, logw, k, v))
        minus_kappa, kappa_a = minus_kappa.view(by_head), kappa_a.view(by_head)
        y, wkv = wkv7(r, logw, k, v, minus_kappa, kappa_a, wkv, cu_seqlens=packing.cu_seqlens)
        # g * (norm(y) + (r . (r_k * k)) v): the current token also reads itself
        y = fused.readout(y, g, self.ln_x, r, k, v, self.r_k)
        return self.output(y), v_first, shift, wkv


class ChannelMix7(nn.Module):
    """out = W_v relu(W_k x_k)^2,  x_k = x mixed with the token before"""

    def __init__(self, c):
        super().__init__()
        self.x_k = vector(c.n_embd)
        self.key, self.value = Linear(c.n_embd, c.dim_ffn), Linear(c.dim_ffn, c.n_embd)

    def forward(self, x, shift, packing):
        x_prev, shift = token_shift(x, shift, packing)
        (x_k,) = fused.mix(x, x_prev, self.x_k)  # x + (x_prev - x) * self.x_k
        return self.value(fused.relu_squared(self.key(x_k))), shift


class TimeMix6(nn.Module):
    """As TimeMix7, with nothing removed but by decay, and read before the token is written, the
    token itself through u:

      y_t = (S_{t-1} + v_t (u * k_t)') r_t
      S_t = S_{t-1} diag(w_t) + v_t k_t'
      out = W_o (silu(W_g x_g) * norm(y))

    How much of the token before goes into each of w k v r g depends on the token: a low-rank pair,
    time_maa_w1/w2.
    """

    def __init__(self, c):
        super().__init__()
        C, self.H, self.N = c.n_embd, c.n_embd // c.head_size, c.head_size
        self.time_maa_x, self.time_maa_w, self.time_maa_k = vector(C), vector(C), vector(C)
        self.time_maa_v, self.time_maa_r, self.time_maa_g = vector(C), vector(C), vector(C)
        self.time_maa_w1, self.time_maa_w2 = matrix(C, 5 * c.mix_rank), matrix(5, c.mix_rank, C)
        self.time_decay = vector(C)
        self.time_decay_w1, self.time_decay_w2 = matrix(C, c.decay_rank), matrix(c.decay_rank, C)
        self.time_faaaa = matrix(self.H, self.N)  # u
        self.receptance, self.key, self.value = Linear(C, C), Linear(C, C), Linear(C, C)
        self.gate, self.output = Linear(C, C), Linear(C, C)
        self.ln_x = LayerNorm(C)

    def forward(self, x, v_first, shift, wkv, packing):
        """As TimeMix7.forward; RWKV-6 has no value residual and hands v_first through."""
        B, T, C = x.shape
        x_prev, shift = token_shift(x, shift, packing)
        (x_x,) = fused.mix(x, x_prev, self.time_maa_x)  # x + (x_prev - x) * time_maa_x
        h = torch.tanh(fused.linear(x_x, cast(self.time_maa_w1, x.dtype).mT)).unflatten(-1, (5, -1))
        h = h.movedim(2, 0).contiguous()  # [5, B, T, rank]
        ups = cast(self.time_maa_w2, x.dtype)  # [5, rank, C]
        h = [fused.linear(part, up.mT) for part, up in zip(h, ups, strict=True)]
        # x_w = x + (x_prev - x) * (time_maa_w + h[0]), and so on
        maa = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        x_w, x_k, x_v, x_r, x_g = fused.mix(x, x_prev, *maa, offsets=h)
        r = self.receptance(x_r)
        k = self.key(x_k)
        v = self.value(x_v)
        g = F.silu(self.gate(x_g))
        decay = fused.as_float32(self.time_decay)
        logw = -torch.exp(decay + low_rank(x_w, self.time_decay_w1, self.time_decay_w2, torch.tanh))

        r, logw, k, v = (t.view(B, T, self.H, self.N) for t in (r, logw, k, v))
        u = cast(self.time_faaaa, x.dtype)
        y, wkv = wkv6(r, logw, k, v, u, wkv, cu_seqlens=packing.cu_seqlens)
        y = fused.readout(y, g, self.ln_x)  # norm(y) * g
        return self.output(y), v_first, shift, wkv


class ChannelMix6(nn.Module):
    """out = sigmoid(W_r x_r) * W_v relu(W_k x_k)^2"""

    def __init__(self, c):
        super().__init__()
        self.time_maa_k, self.time_maa_r = vector(c.n_embd), vector(c.n_embd)
        self.key, self.value = Linear(c.n_embd, c.dim_ffn), Linear(c.dim_ffn, c.n_embd)
        self.receptance = Linear(c.n_embd, c.n_embd)

    def forward(self, x, shift, packing):
        x_prev, shift = token_shift(x, shift, packing)
        x_k, x_r = fused.mix(x, x_prev, self.time_maa_k, self.time_maa_r)
        k = fused.relu_squared(self.key(x_k))
        return torch.sigmoid(self.receptance(x_r)) * self.value(k), shift


class Block(nn.Module):
    """x + TimeMix(norm(x)), then x + ChannelMix(norm(x))"""

    def __init__(self, c, layer):
        super().__init__()
        if layer == 0:
            self.ln0 = LayerNorm(c.n_embd)
        self.ln1, self.ln2 = LayerNorm(c.n_embd), LayerNorm(c.n_embd)
        self.att = TimeMix7(c) if c.version == "x070" else TimeMix6(c)
        self.ffn = ChannelMix7(c) if c.version == "x070" else ChannelMix6(c)

    def forward(self, x, v_first, wkv, att_shift, ffn_shift, packing):
        """x [B, T, C] and one layer of the state -> the same, after the block."""
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        h, v_first, att_shift, wkv = self.att(self.ln1(x), v_first, att_shift, wkv, packing)
        x = x + h
        h, ffn_shift = self.ffn(self.ln2(x), ffn_shift, packing)
        return x + h, v_first, wkv, att_shift, ffn_shift


# ----------------------------------------------------------------------------------------------
# the network


class RWKV(nn.Module):
    def __init__(self, config):
        super().__init__()
        c = self.config = config
        self.emb = nn.Embedding(c.vocab_size, c.n_embd, _weight=torch.empty(c.vocab_size, c.n_embd))
        self.blocks = nn.ModuleList(Block(c, layer) for layer in range(c.n_layer))
        self.ln_out = LayerNorm(c.n_embd)
        self.head = Linear(c.n_embd, c.vocab_size)
        self.score = None  # [1, C], of a reward model: add_score
        self.tune = ""  # what trains: set_tune
        self.tuned, self.task = nn.ModuleList(), 0  # states to start from, and the one in use
        self.compute_dtype = None  # of activations; None: the embedding's own
        self.grad_cp = False  # recompute blocks in backward: less memory, about a third more time
        self.keep_casts = True  # without grad_cp: cast float32 weights once for an optimiser step
        for name, p in self.named_parameters():
            if not p.is_meta:
                init_parameter(name, p.data, c)
            p.requires_grad = name not in NEVER_TRAINED

    def add_score(self):
        """A scalar head that starts at zero and is kept in float32, for forward(…, score=True)."""
        dtype = torch.promote_types(self.emb.weight.dtype, torch.float32)
        self.score = Linear(self.config.n_embd, 1).to(self.emb.weight.device, dtype)
        nn.init.zeros_(self.score.weight)

    def zero_state(self, sequences):
        """The state of B or D sequences that have read nothing."""
        c, weight = self.config, self.emb.weight
        L, C, H, N = c.n_layer, c.n_embd, c.n_embd // c.head_size, c.head_size
        dtype, device = torch.promote_types(weight.dtype, torch.float32), weight.device
        wkv = torch.zeros(L, sequences, H, N, N, dtype=dtype, device=device)
        dtype = self.compute_dtype or weight.dtype
        shift = torch.zeros(L, sequences, C, dtype=dtype, device=device)
        return {"wkv": wkv, "att_shift": shift, "ffn_shift": shift.clone()}

    def initial_state(self, sequences):
        """What B or D sequences start from: zeros, or the tuned state of the task in use."""
        if not self.tuned:
            return self.zero_state(sequences)
        one = {key: value[:, None] for key, value in self.tuned[self.task]().items()}  # [L, 1, …]
        return {key: v.expand(-1, sequences, *v.shape[2:]) for key, v in one.items()}

    def forward(
        self,
        idx,
        state=None,
        *,
        cu_seqlens=None,
        targets=None,
        temperature=1.0,
        l2wrap=0.0,
        last_only=False,
        score=False,
        chunk_len=0,
    ):
        """idx [B, T] integers, T >= 1, state as in the glossary or None for the initial one
        -> (logits [B, T, V], state)

        cu_seqlens [D + 1]: B = 1 and D documents end to end, each with its own state.
        targets [B, T]: -> (TokenScores, state) of the distribution at this temperature, without
            [B, T, V] in memory; l2wrap as in fused.score_tokens.
        last_only: logits [B or D, 1, V] of each sequence's last token.
        score: the scalar head, -> (scores [B or D], state) at each sequence's last token.
        chunk_len: keep the activations of so many tokens at a time, and run them again in backward;
            the gradient is that of the whole. For targets; without, -> (None, state). With score
            all runs whole.
        """
        T, scores = idx.shape[1], []
        in_chunks = 0 < chunk_len < T and not score
        for a, b, cu_of_chunk in pieces(T, cu_seqlens, chunk_len if in_chunks else 0):
            packing = packing_of(cu_of_chunk, idx[:, a:b])
            chunk = (idx[:, a:b], state, packing)
            # What comes out of the blocks is scored outside of the checkpoint, so that the head is
            # not run twice. The last chunk comes first in backward: its activations may stay.
            if b < T and torch.is_grad_enabled():
                x, state = checkpoint(self.hidden, *chunk, use_reentrant=False)
            else:
                x, state = self.hidden(*chunk)
            if targets is not None:
                scores.append(self.score_targets(x, targets[:, a:b], temperature, l2wrap))
        if targets is not None:
            return TokenScores(*(torch.cat(parts, 1) for parts in zip(*scores, strict=True))), state
        if in_chunks:
            return None, state
        if last_only or score:
            last = packing.last
            x = x[:, -1:] if last is None else x[0, last][:, None]  # [B or D, 1, C]
        if score:
            return self.score(fused.as_float32(x)).flatten(), state
        return self.head(x), state

    def hidden(self, idx, state, packing):
        """idx [B, T] -> (what the head reads, [B, T, C], state)"""
        if state is None:
            sequences = idx.shape[0]  # len() would be a constant to torch.export
            if packing.cu_seqlens is not None:
                sequences = len(packing.cu_seqlens.host) - 1
            state = self.initial_state(sequences)
        x = self.emb(idx).to(self.compute_dtype or self.emb.weight.dtype)
        v_first, layers = None, []
        for layer, block in enumerate(self.blocks):
            before = [state[key][layer] for key in ("wkv", "att_shift", "ffn_shift")]
            if self.grad_cp and torch.is_grad_enabled():
                after = checkpoint(block, x, v_first, *before, packing, use_reentrant=False)
            else:
                with casts.keep(block, x.dtype, self.keep_casts):
                    after = block(x, v_first, *before, packing)
            x, v_first, *after = after
            layers.append(after)
        wkv, att_shift, ffn_shift = map(torch.stack, zip(*layers, strict=True))
        return self.ln_out(x), {"wkv": wkv, "att_shift": att_shift, "ffn_shift": ffn_shift}

    def score_targets(self, x, targets, temperature, l2wrap):
        """x [B, T, C] from `hidden`, targets [B, T] -> TokenScores"""
        h, targets_flat = x.flatten(0, 1), targets.flatten().long()  # [B T, C], [B T]
        weight = self.head.whole_weight()
        with casts.keep(self.head, x.dtype, self.keep_casts and not self.grad_cp):
            scores = fused.score_tokens(h, weight, targets_flat, temperature, l2wrap)
        return TokenScores(*(values.view(targets.shape) for values in scores))

    def token_logprobs(self, idx, targets, state=None, *, cu_seqlens=None, temperature=1.0):
        """[B, T] log-probability of each target; for use outside DDP, which only sees `forward`."""
        options = dict(cu_seqlens=cu_seqlens, targets=targets, temperature=temperature)
        return self(idx, state, **options)[0].logps

    def param_groups(self, lr, weight_decay):
        """Upstream's optimiser groups, for torch.optim.AdamW; what trains is in exactly one each.

        x070: w0 learns at twice the rate; x060: time_decay does. Decay only on the large `.weight`
        matrices: on anything else it is clearly worse (BlinkDL).
        """
        groups = {
            "2x": dict(lr=2 * lr, weight_decay=0.0, params=[]),
            "decay": dict(lr=lr, weight_decay=weight_decay, params=[]),
            "1x": dict(lr=lr, weight_decay=0.0, params=[]),
        }
        twice = "att.w0" if self.config.version == "x070" else "att.time_decay"
        for name, p in self.named_parameters():
            if name.endswith(twice):
                group = "2x"
            elif weight_decay > 0 and ".weight" in name and p.squeeze().dim() >= 2:
                group = "decay"
            else:
                group = "1x"
            if p.requires_grad:
                groups[group]["params"].append(p)
        return [dict(name=name, **group) for name, group in groups.items() if group["params"]]

    # Plumbing that lives in gosling/, under the names where people look for it.
    def set_tune(self, tune, **options):
        """What trains: "full", "lora", "state" or "head"; options as in gosling/tune.py."""
        from gosling.tune import set_tune

        set_tune(self, tune, **options)

    def reference(self):
        """`with model.reference():` the same network without its adapter or tuned state."""
        from gosling.tune import reference

        return reference(self)

    @staticmethod
    def from_pretrained(path, device="cpu", dtype=torch.float32):
        """An official x060 or x070 file, `.pth` or `.safetensors`; sizes come from its tensors."""
        from gosling.weights import from_pretrained

        return from_pretrained(path, device, dtype)

    def save_pretrained(self, path, dtype=None):
        """Official names and shapes, `.pth` or `.safetensors` by the path's ending, atomically."""
        from gosling.weights import save_pretrained

        save_pretrained(self, path, dtype)


# ----------------------------------------------------------------------------------------------
# initial values


@torch.no_grad()
def init_parameter(name, p, c):
    """Upstream's initial value for the parameter of this official name, in place.

    Source: RWKV-LM's RWKV-v7/train_temp (x070) and RWKV-v5 (x060). What is in neither table is 1
    for the weights of norms, and 0 for their biases, for the first halves of low-rank pairs and for
    what writes into the residual stream.
    """
    found = re.match(r"blocks\.(\d+)\.(.*)", name)
    layer, leaf = (int(found[1]), found[2]) if found else (0, name)
    values = initial_values(layer, c)
    gains = {  # of random orthogonal matrices
        **dict.fromkeys(("att.receptance.weight", "att.value.weight", "ffn.key.weight"), 1),
        **dict.fromkeys(("att.key.weight", "att.gate.weight"), 0.1),
        "head.weight": 0.5 * math.sqrt(max(1, c.vocab_size / c.n_embd)),
    }
    if leaf in values:
        value = torch.as_tensor(values[leaf], dtype=torch.float32)
        p.copy_(value.expand(p.numel()).reshape(p.shape))
    elif leaf in gains:
        nn.init.orthogonal_(p, gain=gains[leaf])
    elif re.fullmatch(r"att\.[wavg]2", leaf):  # second halves of RWKV-7's low-rank pairs
        nn.init.orthogonal_(p, gain=0.1 * math.sqrt(max(1, p.shape[0] / p.shape[1])))
    elif leaf in ("att.time_maa_w2", "att.time_decay_w2"):
        p.uniform_(-0.01, 0.01)
    elif leaf == "emb.weight":
        p.uniform_(-1e-4, 1e-4)
    elif re.fullmatch(r"(.*\.)?ln\w*\.weight", leaf):
        p.fill_(1)
    else:
        p.zero_()


def initial_values(layer, c):
    """{parameter: the value of each of its C channels, or one for all}, for a layer."""
    C, L, N = c.n_embd, c.n_layer, c.head_size
    i = torch.arange(C, dtype=torch.float32)
    channel = i / C  # 0 .. 1 over the channels, without the end
    across = i / max(C - 1, 1)  # 0 .. 1 over the channels
    depth = layer / max(L - 1, 1)  # 0 in the first layer, 1 in the last
    height = 1 - layer / L  # 1 in the first layer, 1 / L in the last
    in_head = (i % N - (N - 1) / 2) / max((N - 1) / 2, 1e-9)  # -1 .. 1 over a head's channels
    zigzag = in_head * in_head.abs()
    return {
        # How much of the token before each mix takes: 1 - channel ** power.
        "att.x_r": 1 - channel ** (0.2 * height),
        "att.x_w": 1 - channel ** (0.9 * height),
        "att.x_k": 1 - channel ** (0.7 * height),
        "att.x_v": 1 - channel ** (0.7 * height),
        "att.x_a": 1 - channel ** (0.9 * height),
        "att.x_g": 1 - channel ** (0.2 * height),
        "ffn.x_k": 1 - channel ** (height**4),
        "att.time_maa_x": 1 - channel**height,
        "att.time_maa_w": 1 - channel**height,
        "att.time_maa_k": 1 - channel**height,
        "att.time_maa_v": 1 - (channel**height + 0.3 * depth),
        "att.time_maa_r": 1 - channel ** (0.5 * height),
        "att.time_maa_g": 1 - channel ** (0.5 * height),
        "ffn.time_maa_k": 1 - channel ** (height**3),
        "ffn.time_maa_r": 1 - channel ** (height**3),
        # Decays, from slow to fast over the channels; rates, gates and bonus.
        "att.w0": -6 + 6 * across ** (1 + depth**0.3) + 0.5 + 2.5 * zigzag,
        "att.a0": -0.19 + 0.3 * zigzag + 0.4 * (across - 0.5),
        "att.v0": 0.73 - 0.4 * (across - 0.5),
        "att.k_k": 0.71 - 0.1 * (across - 0.5),
        "att.k_a": 1.02,
        "att.r_k": -0.04,
        "att.time_decay": -6 + 5 * across ** (0.7 + 1.3 * depth),
        "att.time_faaaa": depth * (1 - across) + 0.1 * ((i + 1) % 3 - 1),
        "att.ln_x.weight": ((1 + layer) / L) ** 0.7,
    }
