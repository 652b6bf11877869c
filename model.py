"""RWKV-6 (x060, "Finch") and RWKV-7 (x070, "Goose"), with official names and shapes for every weight.

  RWKV-7: https://arxiv.org/abs/2503.14456      RWKV-6: https://arxiv.org/abs/2404.05892

A transformer's block with both halves replaced. Time mixing stands where attention does: a head does not keep all past
keys and values but one matrix S [N, N] of fixed size, into which each token writes its value under its key, and from which
it reads with its receptance r, the query (`TimeMix7`). Channel mixing stands where the MLP does (`ChannelMix7`). Both see
the token before as well (`token_shift`, `mix`), and there are no positions: order is in the recurrence.

Glossary of shapes
  B rows of a batch      T tokens of a row        V vocabulary          C width, n_embd       L layers
  N head size, 64        H heads, C / N           D documents packed end to end in one row (B = 1, cu_seqlens [D + 1])
  idx, targets [B, T]    logits [B, T, V]         r k v w a g [B, T, C] or, by head, [B, T, H, N]
  state: {"wkv": [L, B, H, N, N] float32, rows = value, columns = key;  "att_shift", "ffn_shift": [L, B, C]}, with D in
  place of B when packed. It is a value: index it along B, repeat it, save it, differentiate through it. Feeding a
  sequence whole, in pieces or token by token gives the same numbers.

Parameters may be float32 while the network computes in bfloat16: `model.compute_dtype` is what activations are in, and
every weight is cast where it is used. The decay and the state stay float32.
"""

import contextlib
import errno
import functools
import hashlib
import itertools
import json
import math
import re
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch.utils.checkpoint import checkpoint

import common
import wkv_cuda
from common import UserError
from wkv_cuda import wkv6, wkv7


NEVER_TRAINED = (
    "blocks.0.att.v0",
    "blocks.0.att.v1",
    "blocks.0.att.v2",
)  # no layer below to take values from


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
            raise UserError(f"version={self.version!r}: expected x060 (RWKV-6) or x070 (RWKV-7)")
        for name in ("n_layer", "n_embd", "head_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name}={getattr(self, name)}: expected a number above 0")
        if self.n_embd % self.head_size:
            raise UserError(
                f"n_embd={self.n_embd} is not a multiple of head_size={self.head_size}; "
                f"try n_embd={-(-self.n_embd // self.head_size) * self.head_size}"
            )
        C = self.n_embd

        def rank(factor):  # upstream's rule for new models; files carry their own ranks
            return max(32, 32 * round(factor * math.sqrt(C) / 32))

        rule = dict(
            dim_ffn=4 * C,
            decay_rank=rank(2.5),
            iclr_rank=rank(2.5),
            value_rank=rank(1.7),
            gate_rank=rank(5.0),
        )
        if self.version == "x060":
            rule = dict(dim_ffn=int(3.5 * C) // 32 * 32, decay_rank=64, mix_rank=32)
        for name, value in rule.items():
            setattr(self, name, getattr(self, name) or value)


class TokenScores(NamedTuple):
    logps: torch.Tensor  # [B, T] log-probability of each target
    entropy: torch.Tensor  # [B, T] of the distribution at each position, nats
    hits: torch.Tensor  # [B, T] bool: the target is the likeliest token


class Packing(NamedTuple):
    """Borders of D documents laid end to end, worked out once per forward."""

    cu_seqlens: torch.Tensor  # [D + 1] on the CPU
    filled: torch.Tensor  # indices of documents with at least one token
    first: torch.Tensor  # their first tokens
    last: torch.Tensor  # their last tokens

    @staticmethod
    def of(cu_seqlens, device):
        if cu_seqlens is None:
            return None
        cu = torch.as_tensor(cu_seqlens).to("cpu", torch.int64)
        filled = cu.diff().nonzero()[:, 0]
        return Packing(
            cu, filled.to(device), cu[:-1][filled].to(device), (cu[1:][filled] - 1).to(device)
        )


# ---------------------------------------------------------------------------------------------------------------------
# layers


class OneDNN(torch.autograd.Function):
    """x w' in float32 on a CPU. F.linear takes MKL, which on some CPUs needs half as long again as oneDNN; for w's gradient
    they are equal."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        return (
            torch.ops.mkldnn._linear_pointwise(dy, w.mT, None, "none", [], "")
            if ctx.needs_input_grad[0]
            else None,
            dy.flatten(0, -2).mT @ x.flatten(0, -2) if ctx.needs_input_grad[1] else None,
        )


def linear(x, w):
    """x [..., in], w [out, in] -> [..., out]"""
    # small ones gain nothing, and oneDNN keeps code for every shape that it has seen
    large = x.device.type == "cpu" and x.dtype == w.dtype == torch.float32 and w.numel() >= 2**16
    return OneDNN.apply(x, w) if large and torch.backends.mkldnn.is_available() else F.linear(x, w)


class Linear(nn.Linear):
    """y = W x, and with an adapter (LoRA, arXiv 2106.09685)  y = W x + scale B A x;  A [r, in], B [out, r]."""

    def __init__(self, n_in, n_out):
        super().__init__(n_in, n_out, bias=False)
        self.lora_A = self.lora_B = None  # add_lora

    def reset_parameters(
        self,
    ):  # nn.Linear would draw numbers at once; init_parameter does it, by name
        pass

    def add_lora(self, r, scale, dropout):
        """A random, B zero: the network is unchanged until B has moved. Trained, so in float32."""
        like = dict(
            device=self.weight.device, dtype=torch.promote_types(self.weight.dtype, torch.float32)
        )
        self.lora_A = nn.Parameter(
            nn.init.kaiming_uniform_(torch.empty(r, self.in_features, **like), a=math.sqrt(5))
        )
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, **like))
        self.lora_scale, self.lora_dropout = scale, dropout

    def forward(self, x):
        y = linear(x, self.weight.to(x.dtype))
        if self.lora_A is None:
            return y
        h = linear(F.dropout(x, self.lora_dropout, self.training), self.lora_A.to(x.dtype))
        return torch.add(y, linear(h, self.lora_B.to(x.dtype)), alpha=self.lora_scale)


class LayerNorm(nn.LayerNorm):
    def forward(self, x):
        return F.layer_norm(
            x, self.normalized_shape, self.weight.to(x.dtype), self.bias.to(x.dtype), self.eps
        )


def matrix(*shape):
    return nn.Parameter(torch.empty(*shape))


vector = functools.partial(matrix, 1, 1)


def fp32(x):
    """x in float32; float64 stays, so that tests can run the whole network in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def low_rank(x, down, up, activation=None):
    """activation(x @ down) @ up; these pairs are stored [in, rank], [rank, out]."""
    h = linear(x, down.to(x.dtype).mT)
    return linear(activation(h) if activation else h, up.to(x.dtype).mT)


def token_shift(x, last, packing):
    """x [B, T, C], last [B or D, C], the input before the first token -> (x of the token before [B, T, C], new last)."""
    last = last.to(x.dtype)  # a state may come from a run in another precision
    if packing is None:
        return torch.cat([last[:, None], x[:, :-1]], 1), x[:, -1]
    before = torch.cat([x[:, :1], x[:, :-1]], 1).index_copy(
        1, packing.first, last[None, packing.filled]
    )
    return before, last.index_copy(0, packing.filled, x[0, packing.last])


class Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, before, *weights):
        ctx.save_for_backward(x, before, *weights)
        return tuple(wkv_cuda.cpu.mix(x, before, weights))

    @staticmethod
    def backward(ctx, *grads):
        x, before, *weights = ctx.saved_tensors
        return tuple(wkv_cuda.cpu.mix(x, before, weights, grads))


def mix(x, before, *weights):
    """x + (before - x) m for each m of weights; x and the token before [B, T, C]"""
    weights = [m.to(x.dtype) for m in weights]
    if wkv_cuda.cpu.fits(x):
        return Mix.apply(x, before, *weights)  # one pass over memory, and one in backward
    delta = before - x
    return [torch.addcmul(x, delta, m) for m in weights]


def head_norm(y, norm):
    """Layer norm of each head by itself, then weight and bias over C. y [B, T, H, N] -> [B, T, C]"""
    y = F.layer_norm(y, y.shape[-1:], eps=64e-5).flatten(2)
    return torch.addcmul(norm.bias.to(y.dtype), y, norm.weight.to(y.dtype))


class TimeMix7(nn.Module):
    """For each head, with * by element, k' a row, and every vector computed from its own mix of x with the token before:

    S_t = S_{t-1} (diag(w_t) - kappa_t (a_t * kappa_t)') + v_t k_t'       w decays each key channel; what S holds under the
    y_t = S_t r_t                                                         unit key kappa is replaced at the rate a
    out = W_o (g * (norm(y) + (r . (r_k * k)) v))
    """

    def __init__(self, c):
        super().__init__()
        C, self.H, self.N = c.n_embd, c.n_embd // c.head_size, c.head_size
        self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g = (vector(C) for _ in range(6))
        self.w0, self.w1, self.w2 = vector(C), matrix(C, c.decay_rank), matrix(c.decay_rank, C)
        self.a0, self.a1, self.a2 = vector(C), matrix(C, c.iclr_rank), matrix(c.iclr_rank, C)
        self.v0, self.v1, self.v2 = vector(C), matrix(C, c.value_rank), matrix(c.value_rank, C)
        self.g1, self.g2 = matrix(C, c.gate_rank), matrix(c.gate_rank, C)
        self.k_k, self.k_a, self.r_k = vector(C), vector(C), matrix(self.H, self.N)
        self.receptance, self.key, self.value, self.output = (Linear(C, C) for _ in range(4))
        self.ln_x = LayerNorm(C)

    def forward(self, x, v_first, shift, wkv, packing):
        """x [B, T, C] -> (out [B, T, C], v_first, shift, wkv). v_first: the first layer's values, None in that layer."""
        heads = (*x.shape[:2], self.H, self.N)
        before, shift = token_shift(x, shift, packing)
        x_r, x_w, x_k, x_v, x_a, x_g = mix(
            x, before, self.x_r, self.x_w, self.x_k, self.x_v, self.x_a, self.x_g
        )
        r, k, v = self.receptance(x_r), self.key(x_k), self.value(x_v)
        # decay in (0.545, 1): log w = -exp(-1/2) sigmoid(.)
        logw = -math.exp(-0.5) * torch.sigmoid(
            fp32(self.w0) + low_rank(x_w, self.w1, self.w2, torch.tanh)
        )
        if v_first is None:
            v_first = v
        else:
            v = torch.lerp(
                v, v_first, torch.sigmoid(self.v0.to(x.dtype) + low_rank(x_v, self.v1, self.v2))
            )
        a = torch.sigmoid(
            self.a0.to(x.dtype) + low_rank(x_a, self.a1, self.a2)
        )  # in-context learning rate
        g = low_rank(x_g, self.g1, self.g2, torch.sigmoid)
        kappa = F.normalize(
            (k * self.k_k.to(x.dtype)).view(heads), dim=-1
        )  # removal key, unit length
        k = k * torch.addcmul(
            1 - self.k_a.to(x.dtype), a, self.k_a.to(x.dtype)
        )  # k (1 + (a - 1) k_a)
        r, k, v = r.view(heads), k.view(heads), v.view(heads)
        y, wkv = wkv7(
            r,
            logw.view(heads),
            k,
            v,
            -kappa,
            kappa * a.view(heads),
            wkv,
            cu_seqlens=packing and packing.cu_seqlens,
        )
        bonus = (r * k * self.r_k.to(x.dtype)).sum(
            -1, keepdim=True
        ) * v  # the current token, by itself
        y = head_norm(y, self.ln_x) + bonus.flatten(2)
        return self.output(y * g), v_first, shift, wkv


class ChannelMix7(nn.Module):
    """out = W_v relu(W_k x_k)^2,  x_k = x mixed with the token before"""

    def __init__(self, c):
        super().__init__()
        self.x_k = vector(c.n_embd)
        self.key, self.value = Linear(c.n_embd, c.dim_ffn), Linear(c.dim_ffn, c.n_embd)

    def forward(self, x, shift, packing):
        before, shift = token_shift(x, shift, packing)
        k = self.key(*mix(x, before, self.x_k))
        return self.value(torch.relu(k).square()), shift


class TimeMix6(nn.Module):
    """As TimeMix7, with nothing removed but by decay, and read before the token is written, the token itself through u:

      y_t = (S_{t-1} + v_t (u * k_t)') r_t       S_t = S_{t-1} diag(w_t) + v_t k_t'       out = W_o (silu(W_g x_g) * norm(y))

    How much of the token before goes into each of w k v r g depends on the token: a low-rank pair, time_maa_w1/w2.
    """

    def __init__(self, c):
        super().__init__()
        C, self.H, self.N = c.n_embd, c.n_embd // c.head_size, c.head_size
        (
            self.time_maa_x,
            self.time_maa_w,
            self.time_maa_k,
            self.time_maa_v,
            self.time_maa_r,
            self.time_maa_g,
        ) = (vector(C) for _ in range(6))
        self.time_maa_w1, self.time_maa_w2 = matrix(C, 5 * c.mix_rank), matrix(5, c.mix_rank, C)
        self.time_decay = vector(C)
        self.time_decay_w1, self.time_decay_w2 = matrix(C, c.decay_rank), matrix(c.decay_rank, C)
        self.time_faaaa = matrix(self.H, self.N)
        self.receptance, self.key, self.value, self.gate, self.output = (
            Linear(C, C) for _ in range(5)
        )
        self.ln_x = LayerNorm(C)

    def forward(self, x, v_first, shift, wkv, packing):
        """As TimeMix7.forward; RWKV-6 has no value residual and hands v_first through."""
        heads = (*x.shape[:2], self.H, self.N)
        before, shift = token_shift(x, shift, packing)
        delta = before - x
        h = torch.tanh(
            torch.addcmul(x, delta, self.time_maa_x.to(x.dtype)) @ self.time_maa_w1.to(x.dtype)
        )
        h = torch.einsum("btmr,mrc->mbtc", h.unflatten(-1, (5, -1)), self.time_maa_w2.to(x.dtype))
        maa = (self.time_maa_w, self.time_maa_k, self.time_maa_v, self.time_maa_r, self.time_maa_g)
        x_w, x_k, x_v, x_r, x_g = (
            torch.addcmul(x, delta, m.to(x.dtype) + h[i]) for i, m in enumerate(maa)
        )
        r, k, v, g = self.receptance(x_r), self.key(x_k), self.value(x_v), F.silu(self.gate(x_g))
        logw = -torch.exp(
            fp32(self.time_decay)
            + low_rank(x_w, self.time_decay_w1, self.time_decay_w2, torch.tanh)
        )
        y, wkv = wkv6(
            r.view(heads),
            logw.view(heads),
            k.view(heads),
            v.view(heads),
            self.time_faaaa.to(x.dtype),
            wkv,
            cu_seqlens=packing and packing.cu_seqlens,
        )
        return self.output(head_norm(y, self.ln_x) * g), v_first, shift, wkv


class ChannelMix6(nn.Module):
    """out = sigmoid(W_r x_r) * W_v relu(W_k x_k)^2"""

    def __init__(self, c):
        super().__init__()
        self.time_maa_k, self.time_maa_r = vector(c.n_embd), vector(c.n_embd)
        self.key, self.value = Linear(c.n_embd, c.dim_ffn), Linear(c.dim_ffn, c.n_embd)
        self.receptance = Linear(c.n_embd, c.n_embd)

    def forward(self, x, shift, packing):
        before, shift = token_shift(x, shift, packing)
        x_k, x_r = mix(x, before, self.time_maa_k, self.time_maa_r)
        k, r = self.key(x_k), self.receptance(x_r)
        return torch.sigmoid(r) * self.value(torch.relu(k).square()), shift


class Block(nn.Module):
    """x + TimeMix(norm(x)), then x + ChannelMix(norm(x))"""

    def __init__(self, c, layer):
        super().__init__()
        if layer == 0:
            self.ln0 = LayerNorm(c.n_embd)
        self.ln1, self.ln2 = LayerNorm(c.n_embd), LayerNorm(c.n_embd)
        self.att = TimeMix7(c) if c.version == "x070" else TimeMix6(c)
        self.ffn = ChannelMix7(c) if c.version == "x070" else ChannelMix6(c)

    def forward(self, x, v_first, att_shift, ffn_shift, wkv, packing):
        if hasattr(self, "ln0"):
            x = self.ln0(x)
        h, v_first, att_shift, wkv = self.att(self.ln1(x), v_first, att_shift, wkv, packing)
        x = x + h
        h, ffn_shift = self.ffn(self.ln2(x), ffn_shift, packing)
        return x + h, v_first, att_shift, ffn_shift, wkv


class TunedState(nn.Module):
    """A learned start in place of the zero state: wkv, of each layer [H, N, N], and with `shift` both inputs "before the
    first token", [L, C]. encoder: a module whose output [L, H, N, N] is added to wkv (train_state.py has one)."""

    def __init__(self, c, shift=False, layers=()):
        super().__init__()
        H, N, L = c.n_embd // c.head_size, c.head_size, c.n_layer
        if not set(layers) <= set(range(L)):
            raise UserError(f"layers={layers}: expected numbers from 0 to {L - 1}")
        self.wkv = nn.ParameterList(
            nn.Parameter(torch.zeros(H, N, N), i in layers or not layers) for i in range(L)
        )
        self.att_shift, self.ffn_shift = (
            nn.Parameter(torch.zeros(L, c.n_embd), shift) for _ in range(2)
        )
        self.encoder = None

    def forward(self):
        """-> {"wkv": [L, H, N, N], "att_shift", "ffn_shift": [L, C]}"""
        wkv = torch.stack(list(self.wkv))
        return {
            "wkv": wkv if self.encoder is None else wkv + self.encoder(),
            "att_shift": self.att_shift,
            "ffn_shift": self.ffn_shift,
        }

    @torch.no_grad()
    def load(self, state):
        """Start from a state [L, 1, …], as read_state and forward give it."""
        for p, value in zip(
            [*self.wkv, self.att_shift, self.ffn_shift],
            [*state["wkv"][:, 0], state["att_shift"][:, 0], state["ffn_shift"][:, 0]],
        ):
            p.copy_(value)


# ---------------------------------------------------------------------------------------------------------------------
# the head, scored without ever holding [B, T, V]


class ScoreTokens(torch.autograd.Function):
    """h [M, C], head weight [V, C], targets [M] -> logps, entropy, hits, each [M], float32.

    A few rows of logits at a time, recomputed in backward, with z = logits / temperature and p = softmax(z):
      d logp_y / dz = onehot(y) - p          d entropy / dz = -p (log p + entropy)
    l2wrap (upstream's L2Wrap, 1e-4): pulls the largest logit down by l2wrap * its value for each unit of d loss / d logp,
    which keeps logits from drifting in bf16; it changes the gradient and never the loss.
    known: a list, filled by the first run; a second one, of a checkpoint, takes its results from there.
    """

    @staticmethod
    def rows(
        h, weight
    ):  # at a time: 16 MB of float32 logits on a CPU, 256 MB on a GPU, but not few, or dw takes longest
        return max(256, (2**26 if h.is_cuda else 2**22) // len(weight))

    @staticmethod
    def forward(ctx, h, weight, targets, temperature, l2wrap, known=None):
        w, out = weight.to(h.dtype), []
        known = [] if known is None else known
        for x, y in (
            ()
            if known
            else zip(h.split(ScoreTokens.rows(h, w)), targets.split(ScoreTokens.rows(h, w)))
        ):
            z = fp32(linear(x, w))
            if native := wkv_cuda.cpu.score_rows(z, y, temperature):
                out.append(native)
                continue
            z = z / temperature
            lse = z.logsumexp(-1)
            target = z.gather(-1, y[:, None])[:, 0]
            hits = z.argmax(-1) == y
            entropy = lse - ((z - lse[:, None]).exp_().mul_(z)).sum(-1)
            out.append((target - lse, entropy, hits, lse))
        known.extend(torch.cat(t) for t in zip(*out))
        logps, entropy, hits, lse = (
            t.detach() for t in known
        )  # autograd marks the very tensors that are returned
        ctx.save_for_backward(h, weight, targets, lse, entropy)
        ctx.temperature, ctx.l2wrap = temperature, l2wrap
        ctx.mark_non_differentiable(hits)
        ctx.set_materialize_grads(False)
        return logps, entropy, hits

    @staticmethod
    def backward(ctx, dlogps, dentropy, _):
        h, weight, targets, lse, entropy = ctx.saved_tensors
        w, n = weight.to(h.dtype), ScoreTokens.rows(h, weight)
        dlogps = torch.zeros_like(lse) if dlogps is None else dlogps
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for i in range(0, len(h), n):
            q = slice(i, i + n)
            dz = fp32(linear(h[q], w))  # the logits, to begin with
            grads = dlogps[q], None if dentropy is None else dentropy[q]
            if not wkv_cuda.cpu.score_rows(
                dz, targets[q], ctx.temperature, (None, entropy[q], None, lse[q]), grads, ctx.l2wrap
            ):
                logits, logp = dz, dz / ctx.temperature - lse[q, None]
                p = logp.exp()
                dz = (p * -dlogps[q, None]).scatter_add_(-1, targets[q, None], dlogps[q, None])
                if dentropy is not None:
                    dz.addcmul_(p, (logp + entropy[q, None]) * dentropy[q, None], value=-1)
                dz /= ctx.temperature
                if ctx.l2wrap:
                    top, at = logits.max(-1, keepdim=True)
                    dz.scatter_add_(-1, at, -ctx.l2wrap * top * dlogps[q, None])
            dz = dz.to(h.dtype)
            if dh is not None:
                dh[q] = linear(dz, w.mT)
            if dw is not None:
                dw += dz.mT @ h[q]
        return dh, dw, None, None, None, None


# ---------------------------------------------------------------------------------------------------------------------
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
        self.compute_dtype = None  # None: the embedding's own
        self.grad_cp = (
            False  # recompute each block in backward: less memory, about a third more time
        )
        self.tuned, self.task = (
            nn.ModuleList(),
            0,
        )  # learned initial states, one for each task; the one to start from
        self.base = []  # (module, attribute, its value without what tuning added): see reference
        self.step = None  # while generating: one token in one call, see stepper
        for name, p in self.named_parameters():
            if not p.is_meta:
                init_parameter(name, p.data, c)
            # the first layer has no layer below to take values from, so these never get a gradient
            p.requires_grad = name not in NEVER_TRAINED

    def add_score(self):
        """A scalar head that starts at zero and is kept in float32, for `forward(…, score=True)`."""
        like = self.emb.weight
        self.score = Linear(self.config.n_embd, 1).to(
            like.device, torch.promote_types(like.dtype, torch.float32)
        )
        nn.init.zeros_(self.score.weight)

    def initial_state(self, sequences, tasks=None):
        """The state before the first token, for this many sequences: zeros, or the tuned state; tasks [B or D]: of several
        tuned states, the one that each sequence starts from; None = self.task for all."""
        if not self.tuned:
            return self.zero_state(sequences)
        if tasks is None:
            tasks = torch.full((sequences,), self.task, device=self.emb.weight.device)
        values = [tuned() for tuned in self.tuned]
        return {
            key: torch.stack([v[key] for v in values], 1).index_select(1, tasks)
            for key in values[0]
        }

    def prepare_recurrence(self):
        """Build the recurrence's native form now, so that evaluations before the first step run it too, to the last bit."""
        if self.emb.weight.device.type == "cpu":
            wkv_cuda.cpu.unavailable()

    def stepper(self):
        """What computes forward(idx [B, 1], state, out=state) in one C++ call, for as long as no weight is replaced; None
        where that is not possible: not on a CPU, not built, an adapter on, weights of several dtypes."""
        weights = {
            name: p
            for name, p in self.named_parameters()
            if not name.startswith(("score.", "tuned."))
        }
        if (
            self.emb.weight.device.type != "cpu"
            or self.compute_dtype not in (None, self.emb.weight.dtype)
            or any(".lora_" in name for name in weights)
        ):
            return None
        return wkv_cuda.cpu.stepper(
            int(self.config.version[2]), list(weights.values()), self.config
        )

    def zero_state(self, sequences):
        c, weight = self.config, self.emb.weight
        shift = torch.zeros(
            c.n_layer,
            sequences,
            c.n_embd,
            dtype=self.compute_dtype or weight.dtype,
            device=weight.device,
        )
        H = c.n_embd // c.head_size
        wkv = torch.zeros(
            c.n_layer,
            sequences,
            H,
            c.head_size,
            c.head_size,
            device=weight.device,
            dtype=torch.promote_types(weight.dtype, torch.float32),
        )
        return {"wkv": wkv, "att_shift": shift, "ffn_shift": shift.clone()}

    def forward(
        self,
        idx,
        state=None,
        *,
        cu_seqlens=None,
        tasks=None,
        targets=None,
        temperature=1.0,
        l2wrap=0.0,
        last_only=False,
        score=False,
        chunk_len=0,
        known=None,
        out=None,
    ):
        """idx [B, T] integers, T >= 1, state as in the glossary or None for the initial one -> (logits [B, T, V], state).

        cu_seqlens [D + 1]: B = 1 and D documents end to end, each with its own state. tasks: as in `initial_state`.
        targets [B, T]: -> (TokenScores, state) of the distribution at this temperature, without [B, T, V] in memory.
        last_only: logits [B or D, 1, V] of each sequence's last token. score: -> (scores [B or D] there, state).
        chunk_len: run so many tokens at a time, and once more in backward: memory is one chunk's activations and one state
        per chunk, the gradient is that of the whole. For targets; last_only gives (None, state), score runs whole.
        out: a state to write the new one into, without gradient; `state` itself will do. Saves a large allocation per token.
        """
        if self.step and out is state is not None and idx.shape[1] == 1:
            return self.step(idx[:, 0], state)[:, None].to(state["att_shift"].dtype), state
        if 0 < chunk_len < idx.shape[1] and not score:
            return self._in_chunks(
                idx,
                state,
                cu_seqlens,
                targets,
                chunk_len,
                tasks=tasks,
                temperature=temperature,
                l2wrap=l2wrap,
                last_only=last_only,
            )
        packing = Packing.of(cu_seqlens, idx.device)
        sequences = len(idx) if packing is None else len(packing.cu_seqlens) - 1
        state = state or self.initial_state(sequences, tasks)
        x = self.emb(idx).to(self.compute_dtype or self.emb.weight.dtype)
        v_first, new = None, {"att_shift": [], "ffn_shift": [], "wkv": []}
        for layer, block in enumerate(self.blocks):
            args = (
                x,
                v_first,
                state["att_shift"][layer],
                state["ffn_shift"][layer],
                state["wkv"][layer],
                packing,
            )
            if self.grad_cp and torch.is_grad_enabled():
                x, v_first, *after = checkpoint(block, *args, use_reentrant=False)
            else:
                x, v_first, *after = block(*args)
            for key, value in zip(new, after):
                if out is None:
                    new[key].append(value)
                else:
                    out[key][layer].copy_(value)
        state = out or {key: torch.stack(values) for key, values in new.items()}
        if last_only or score:
            x = x[:, -1:] if packing is None else x[0, packing.last][:, None]
        x = self.ln_out(x)
        if score:
            return self.score(fp32(x)).flatten(), state
        if targets is None:
            return self.head(x), state
        scores = ScoreTokens.apply(
            x.flatten(0, 1), self.head.weight, targets.flatten().long(), temperature, l2wrap, known
        )
        return TokenScores(*(s.view(targets.shape) for s in scores)), state

    def _in_chunks(self, idx, state, cu_seqlens, targets, chunk_len, **options):
        """forward's chunk_len. `known` keeps a chunk's scores: its second run, in backward, does without the head."""
        parts = []
        for a, b, cu in pieces(idx.shape[1], cu_seqlens, chunk_len):
            # the last chunk is the first in backward: its activations may stay
            again = torch.is_grad_enabled() and b < idx.shape[1]
            run = (
                functools.partial(checkpoint, self.forward, use_reentrant=False)
                if again
                else self.forward
            )
            part, state = run(
                idx[:, a:b],
                state,
                cu_seqlens=cu,
                targets=targets if targets is None else targets[:, a:b],
                known=[],
                **options,
            )
            parts.append(part)
        return None if targets is None else TokenScores(
            *(torch.cat(part, 1) for part in zip(*parts))
        ), state

    def token_logprobs(self, idx, targets, state=None, *, cu_seqlens=None, temperature=1.0):
        """[B, T] log-probability of each target; for use outside DDP, whose wrapper only sees `forward`."""
        return self(idx, state, cu_seqlens=cu_seqlens, targets=targets, temperature=temperature)[
            0
        ].logps

    # -----------------------------------------------------------------------------------------------------------------
    # what trains

    def set_tune(self, tune, tasks=1, **options):
        """What trains: "full" = every weight; "lora" = an adapter beside the large matrices, `options` as in `_lora`;
        "state" = the state that sequences start from, `options` as in TunedState, and tasks = how many of them; "head" =
        nothing but the scalar head. A scalar head (add_score) trains with any of them, in place of the language model's.
        Everything else gets requires_grad = False and keeps its dtype; what trains is float32. An adapter or a state that
        was there goes."""
        self.base, self.tuned, self.tune = [], nn.ModuleList(), tune
        for m in self.modules():
            if isinstance(m, Linear):
                m.lora_A = m.lora_B = None
        self.requires_grad_(False)
        # with a scalar head the language model's gets no gradient
        frozen = (
            NEVER_TRAINED if self.score is None else (*NEVER_TRAINED, "score.weight", "head.weight")
        )
        if tune == "full":
            for name, p in self.named_parameters():
                p.requires_grad, p.data = name not in frozen, fp32(p.data)
        elif tune == "lora":
            self._lora(frozen, **options)
        elif tune == "state":
            dtype = torch.promote_types(self.emb.weight.dtype, torch.float32)
            self.tuned.extend(
                TunedState(self.config, **options).to(self.emb.weight.device, dtype)
                for _ in range(tasks)
            )
            self.base = [(self, "tuned", nn.ModuleList())]
        elif tune != "head" or self.score is None:
            raise UserError(
                f"tune={tune!r}: expected full, lora or state, or for a reward model head"
            )
        if self.score is not None:
            self.score.requires_grad_(True)

    def _lora(self, frozen, r=32, alpha=64.0, dropout=0.0, rslora=False, targets=(), extra=()):
        """r: rank; the update is scaled by alpha / r, or alpha / sqrt(r) with rslora (arXiv 2312.03732). targets: names of
        matrices, "key" for all of that name or "att.key" for one kind; none = all of att and ffn. extra: further
        parameters to train, by parts of their names ("ln", "x_"); they are saved with the adapter."""
        if r < 1:
            raise UserError(f"lora_r={r}: expected a number above 0")
        strings = lambda x: (x,) if isinstance(x, str) else x  # noqa: E731
        linears = {
            name: m
            for name, m in self.named_modules()
            if isinstance(m, Linear) and f"{name}.weight" not in frozen
        }
        kinds = {name: re.sub(r"blocks\.\d+\.", "", name) for name in linears}
        chosen = set()
        for target in strings(targets) or ("att", "ffn"):
            hits = {
                name for name, kind in kinds.items() if target in (name, kind, *kind.split("."))
            }
            if not hits:
                raise UserError(
                    f"LoRA target {target!r} is not a matrix of {self.config.version}; there are "
                    f"{', '.join(sorted(set(kinds.values())))}"
                )
            chosen |= hits
        for name in sorted(
            chosen
        ):  # a set's own order differs from process to process, and A is random
            linears[name].add_lora(r, alpha / (math.sqrt(r) if rslora else r), dropout)
            self.base.append((linears[name], "lora_A", None))
        for part in strings(extra):
            hits = [
                (name, p) for name, p in self.base_weights() if part in name and name not in frozen
            ]
            if not hits:
                raise UserError(f"extra={part!r}: no parameter has that in its name")
            for name, p in hits:
                p.data, p.requires_grad = fp32(p.data), True
                module, _, leaf = name.rpartition(".")
                self.base.append(
                    (self.get_submodule(module), leaf, nn.Parameter(p.detach().clone(), False))
                )
        self.lora = dict(r=r, alpha=alpha, rslora=rslora, dropout=dropout)

    @contextlib.contextmanager
    def reference(self):
        """The same network without its adapter or tuned state, extra trained parameters as they were: the reference of DPO
        and GRPO."""

        def swap():
            for i, (module, name, value) in enumerate(self.base):
                self.base[i] = module, name, (now := getattr(module, name))
                if (
                    isinstance(value, torch.Tensor) and now is not None
                ):  # the network may have moved since
                    value.data = value.data.to(now.device)
                setattr(module, name, value)

        swap()
        try:
            yield self
        finally:
            swap()

    def param_groups(self, lr, weight_decay):
        """Upstream's optimiser groups, for torch.optim.AdamW; every trainable parameter is in exactly one.

        x070: w0 learns at twice the rate; x060: time_decay does. Decay only on the large `.weight` matrices: on anything
        else it is clearly worse (BlinkDL).
        """
        groups = {"2x": [], "decay": [], "1x": []}
        for name, p in self.named_parameters():
            if p.requires_grad:
                twice = (
                    "att.w0" in name
                    if self.config.version == "x070"
                    else name.endswith("att.time_decay")
                )
                matrix = p.squeeze().dim() >= 2 and (
                    ".weight" in name or name.endswith(("encoder.down", "encoder.up"))
                )
                groups["2x" if twice else "decay" if matrix and weight_decay > 0 else "1x"].append(
                    p
                )
        return [
            dict(
                name=name,
                lr=lr * (2 if name == "2x" else 1),
                weight_decay=weight_decay if name == "decay" else 0.0,
                params=params,
            )
            for name, params in groups.items()
            if params
        ]

    # -----------------------------------------------------------------------------------------------------------------
    # weights in and out

    @staticmethod
    def from_pretrained(path, device="cpu", dtype=torch.float32, weights=None):
        """An official x060 or x070 file, `.pth` or `.safetensors`. Version and every dimension come from the tensors.

        Vectors may be 1 x 1 x C or C, layer 0's v0/v1/v2 there or not. What is missing, extra or misshapen is named.
        Tensors are converted one by one, so that the peak is about the model's own size. weights: of a file that has been
        read; converted in place.
        """
        weights = read_weights(path) if weights is None else weights
        config = config_of(weights, path)
        with torch.device("meta"):
            model = RWKV(config)
            if "score.weight" in weights:
                model.add_score()
        expected, misshapen = {name: p.shape for name, p in model.named_parameters()}, []
        for name, shape in expected.items():
            if name in NEVER_TRAINED and name not in weights:
                weights[name] = init_parameter(name, torch.empty(shape), config)
            w = weights.get(name)
            # only 1-sized axes may differ: [C] and [1, 1, C] are one vector, [C, R] and [R, C] are not one matrix
            if w is not None and [n for n in w.shape if n > 1] != [n for n in shape if n > 1]:
                misshapen.append(f"{name} is {list(w.shape)}, expected {list(shape)}")
            elif w is not None:
                weights[name] = w.to(
                    device=device, dtype=torch.float32 if name == "score.weight" else dtype
                ).reshape(shape)
        missing, extra = (
            [name for name in expected if name not in weights],
            [name for name in weights if name not in expected],
        )
        for what, names in (("missing", missing), ("misshapen", misshapen), ("extra", extra)):
            if names:
                raise UserError(
                    f"{path}: read as {config.version} with {config.n_layer} layers of width {config.n_embd}, "
                    f"but {len(names)} tensors are {what}: {'; '.join(names[:5])}"
                    + (" …" if len(names) > 5 else "")
                    + "; is this a whole, unmodified model file?"
                )
        model.load_state_dict(weights, assign=True)
        return model

    def save_pretrained(self, path, dtype=None):
        """Official names and shapes, `.pth` or `.safetensors` by the path's ending, atomically. dtype None: as they are."""
        write_weights(
            {
                name: p.detach()
                .to("cpu", dtype if dtype and name != "score.weight" else p.dtype)
                .contiguous()
                for name, p in self.base_weights()
            },
            path,
        )

    def base_weights(self):
        """(official name, tensor) of every weight, without adapter and tuned state."""
        return [
            (name, p)
            for name, p in self.named_parameters()
            if ".lora_" not in name and not name.startswith("tuned.")
        ]

    def fingerprint(self):
        """Hexadecimal digest of the weights as bfloat16, without adapter, tuned state and scalar head: the same whatever the
        file's format and the precision it is loaded in."""
        digest = hashlib.blake2b(digest_size=16)
        with self.reference():  # extra parameters of an adapter as the base has them
            for name, p in sorted(self.base_weights()):
                if name not in NEVER_TRAINED and name != "score.weight":
                    digest.update(f"{name} {list(p.shape)}".encode())
                    digest.update(
                        p.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy()
                    )
        return digest.hexdigest()

    def save_state(self, path, task=0, **about):
        """A tuned state for every engine: blocks.{i}.att.time_state [H, N, N] in `path`, `about` and the rest beside it."""
        with torch.no_grad():
            score = {} if self.score is None else {"score": self.score.weight[0].tolist()}
            write_state(
                {key: v[:, None] for key, v in self.tuned[task]().items()}, path, **about, **score
            )

    def save_tuned(self, folder, name, dtype=None, **about):
        """What trains, as folder/rwkv-<name>.pth, lora-<name>.safetensors or state-<name>.pth, or best.* for "best"; about:
        what an adapter's or a state's file should say, its base above all. -> the path

        A LoRA has RWKV-PEFT's keys, ….lora_A [r, in] and ….lora_B [out, r], extra parameters their own names."""
        kind, end = {"lora": ("lora", "safetensors"), "state": ("state", "pth")}.get(
            self.tune, ("rwkv", "pth")
        )
        path = Path(folder) / (f"best.{end}" if name == "best" else f"{kind}-{name}.{end}")
        if kind == "rwkv":
            self.save_pretrained(path, dtype)
        elif kind == "state":
            self.save_state(path, **about)
        else:
            trained = {
                name: p.detach().cpu().contiguous()
                for name, p in self.named_parameters()
                if p.requires_grad
            }
            write_weights(
                trained, path, {key: str(value) for key, value in {**self.lora, **about}.items()}
            )
        return path

    @torch.no_grad()
    def load_tuned(self, path):
        """Values for what trains, from a file of save_tuned; every name and size must fit."""
        if self.tune == "state":
            state, about = read_state(path, self.config)
            self.tuned[0].load(state)
            if self.score is not None and "score" in about:
                self.score.weight[0] = torch.tensor(about["score"])
            return
        saved, own = (
            read_weights(path),
            {name: p for name, p in self.named_parameters() if p.requires_grad},
        )
        for name in sorted(saved.keys() | own.keys() if self.tune == "lora" else own.keys()):
            there, here = (list(w[name].shape) if name in w else "absent" for w in (saved, own))
            if there != here:
                raise UserError(
                    f"{path} is of another base or other settings: {name} is {there} in the file, "
                    f"{here} in the model; check --lora_r, --lora_targets and --init_from"
                )
            own[name].copy_(saved[name])


# ---------------------------------------------------------------------------------------------------------------------
# batches of documents, (ids, mask) pairs, and the gradient in chunks of time


def packed(rows, device="cpu"):
    """Lists of ids -> all of them end to end [1, T], cu_seqlens [D + 1]"""
    ids = torch.tensor([list(itertools.chain(*rows))], dtype=torch.long, device=device)
    return ids, torch.tensor([0, *map(len, rows)]).cumsum(0)


def pack(documents, device="cpu"):
    """[(ids, mask), …] -> x, y [1, T], weight [1, T] float32, cu_seqlens [D + 1]: the next-token pairs of each document,
    end to end; a position's weight is the mask of its target."""
    (x, borders), (y, _) = (
        packed([ids[:-1] for ids, _ in documents], device),
        packed([ids[1:] for ids, _ in documents], device),
    )
    weight = [m for _, mask in documents for m in mask[1:]]
    return x, y, torch.tensor([weight], dtype=torch.float32, device=device), borders


def pad(documents, device="cpu"):
    """The same as rows, right padded: x, y, weight [D, T], and None for cu_seqlens. A causal network never sees what
    lies to the right, and the padding weighs 0."""
    x, y, weight = (
        torch.nn.utils.rnn.pad_sequence(list(map(torch.tensor, part)), batch_first=True).to(device)
        for part in zip(*((ids[:-1], ids[1:], mask[1:]) for ids, mask in documents))
    )
    return x, y, weight.float(), None


def pieces(T, cu_seqlens, chunk_len):
    """[(a, b, cu_seqlens of tokens a..b), …]: a packed row in chunks. A document that a chunk holds nothing of has length
    0 there and hands its state through; chunk_len = 0 is one chunk."""
    step = chunk_len or max(T, 1)
    return [
        (
            a,
            min(a + step, T),
            cu_seqlens if cu_seqlens is None else cu_seqlens.clamp(a, min(a + step, T)) - a,
        )
        for a in range(0, T, step)
    ]


def backward(
    model,
    x,
    y,
    weight,
    cu_seqlens,
    chunk_len=0,
    bptt="full",
    sync=contextlib.nullcontext,
    no_sync=contextlib.nullcontext,
    tasks=None,
):
    """Add the gradient of  loss = -(weight * log p(y | x)).sum()  to the parameters' .grad; -> (each token's share of the
    loss, its weight if it was the likeliest), both like x.

    chunk_len and tasks: as in RWKV.forward. bptt "truncated": a backward pass for every chunk; the state goes on, its
    gradient does not. model: may be a DDP wrapper; its last backward is in `sync`."""
    parts, state = [], None
    for a, b, cu in pieces(x.shape[1], cu_seqlens, chunk_len if bptt == "truncated" else 0):
        with sync() if b == x.shape[1] else no_sync():
            scores, state = model(
                x[:, a:b], state, cu_seqlens=cu, tasks=tasks, targets=y[:, a:b], chunk_len=chunk_len
            )
            loss = -weight[:, a:b] * scores.logps
            loss.sum().backward()
        parts.append((loss.detach(), weight[:, a:b] * scores.hits))
        state = {k: v.detach() for k, v in state.items()}
    return [torch.cat(part, 1) for part in zip(*parts)]


class Forks(NamedTuple):
    """Answers to shared prompts: every prompt runs once, its state is forked to its answers."""

    x1: torch.Tensor  # [1, T1] all but the last token of each of P prompts, packed
    borders1: torch.Tensor  # [P + 1]
    owner: torch.Tensor  # [A] the prompt of each answer
    x2: torch.Tensor  # [1, T2] the prompt's last token and the answer, packed
    y2: torch.Tensor  # [1, T2] what follows each
    borders2: torch.Tensor  # [A + 1]
    row: torch.Tensor  # [T2] the answer that each token of x2 belongs to

    def per_answer(self, values):
        """values [1, T2] -> [A], summed over each answer."""
        return values.new_zeros(len(self.owner)).index_add(0, self.row, values[0])


def fork(groups, device="cpu", whole=False):
    """[(prompt ids, [answer ids, …]), …] -> Forks. whole: also run over each answer's last token, where a score is read."""
    pairs = [(prompt, answer) for prompt, answers in groups for answer in answers]
    x1, borders1 = packed([prompt[:-1] for prompt, _ in groups], device)
    x2, borders2 = packed(
        [prompt[-1:] + (answer if whole else answer[:-1]) for prompt, answer in pairs], device
    )
    y2, _ = packed([answer + [0] * whole for _, answer in pairs], device)
    owner = [i for i, (_, answers) in enumerate(groups) for _ in answers]
    row = torch.arange(len(pairs)).repeat_interleave(borders2.diff()).to(device)
    return Forks(x1, borders1, torch.tensor(owner, device=device), x2, y2, borders2, row)


def forked(model, forks, chunk_len=0, temperature=1.0, score=False):
    """-> TokenScores of the answers' tokens, each [1, T2]; score: the scalar head's score of each answer, [A]."""
    state = getattr(model, "module", model).initial_state(len(forks.borders1) - 1)
    if forks.x1.shape[1]:
        _, state = model(forks.x1, cu_seqlens=forks.borders1, last_only=True, chunk_len=chunk_len)
    state = {k: v[:, forks.owner] for k, v in state.items()}
    return model(
        forks.x2,
        state,
        cu_seqlens=forks.borders2,
        targets=forks.y2,
        temperature=temperature,
        score=score,
        chunk_len=chunk_len,
    )[0]


def forked_backward(
    model, forks, loss_of, chunk_len=0, temperature=1.0, sync=contextlib.nullcontext
):
    """loss_of(TokenScores) -> (loss, anything); adds the loss's gradient, also through the forked states, and returns that."""
    with sync():
        loss, more = loss_of(forked(model, forks, chunk_len, temperature))
        loss.backward()
    return loss.detach(), more


@torch.no_grad()
def evaluate(model, documents, cfg, run):
    """{"val_loss": nats per trained token, "val_accuracy": share of them that are the likeliest}, over all processes."""
    mine, nll, hits, n = documents[run.rank :: run.world], 0.0, 0.0, 0.0
    for i in range(0, len(mine), cfg.micro_bsz):
        x, y, weight, borders = pack(mine[i : i + cfg.micro_bsz], run.device)
        scores, _ = model(x, cu_seqlens=borders, targets=y, chunk_len=cfg.chunk_len)
        nll -= (weight * scores.logps).sum().item()
        hits += (weight * scores.hits).sum().item()
        n += weight.sum().item()
    nll, hits, n = common.all_sum(nll, hits, n)
    return {"val_loss": nll / n, "val_accuracy": hits / n}


# ---------------------------------------------------------------------------------------------------------------------
# files


def load_model(path, device="cpu", dtype=torch.float32):
    """A network by any of its files -> (model, what the file says of itself): whole weights, or a LoRA or a tuned state,
    which name their base and are put on."""
    weights = read_weights(path)
    lora = {
        name.removesuffix(".lora_A"): len(A)
        for name, A in weights.items()
        if name.endswith(".lora_A")
    }
    if not lora and not all(name.endswith(".time_state") for name in weights):
        return RWKV.from_pretrained(path, device, dtype, weights), {}
    state, about = (None, read_metadata(path)) if lora else read_state(path)
    base = base_of(path, about)
    model = RWKV.from_pretrained(base, device, dtype)
    if about.get("fingerprint") not in (None, model.fingerprint()):
        warnings.warn(f"{path} was trained on {about.get('model')}, and {base} has other weights")
    if lora and "alpha" not in about:
        raise UserError(
            f"{path} does not say its alpha; merge it with export.py merge --alpha=…, and give that file"
        )
    if "score.weight" in weights or about.pop("score", None):
        model.add_score()
    if lora:
        extra = [name for name in weights if ".lora_" not in name and name != "score.weight"]
        model.set_tune(
            "lora",
            r=next(iter(lora.values())),
            alpha=float(about["alpha"]),
            rslora=about.get("rslora") == "True",
            targets=list(lora),
            extra=extra,
        )
    else:
        model.set_tune("state", shift=bool(state["att_shift"].any() or state["ffn_shift"].any()))
    model.load_tuned(path)
    return model.to(device), about


def base_of(path, about):
    """The file of the model that an adapter or a state belongs to: where `about` says, or of that name beside it."""
    says = str(about.get("model", ""))
    for place in (Path(path).parent / says, Path(path).parent / Path(says).name):
        if says and place.is_file():
            return str(place)
    raise UserError(
        "which model? --model=FILE, a .pth or .safetensors; "
        + (
            f"{Path(path).parent / says}, which {path} was trained on, is not there"
            if says
            else f"nothing in or beside {path} says which one it was trained on"
            if path
            else "and --prompt, or --chat"
        )
    )


def load_to_tune(cfg, run, score=False):
    """The model of a training script: cfg.init_from, on the device, with what cfg.tune says trainable and cfg.adapter, a
    LoRA or a tuned state, loaded. Trained weights are float32, frozen ones in the run's dtype."""
    if not cfg.init_from:
        raise UserError("which model? --init_from=FILE, the .pth or .safetensors to start from")
    model = RWKV.from_pretrained(
        cfg.init_from, dtype=torch.float32 if cfg.tune == "full" else run.dtype
    )
    if score and model.score is None:
        model.add_score()
    elif not score:
        model.score = None
    torch.manual_seed(cfg.seed)
    model.set_tune(
        cfg.tune,
        **{
            key.removeprefix("lora_"): value
            for key, value in vars(cfg).items()
            if key.startswith("lora_") and cfg.tune == "lora"
        },
    )
    if cfg.adapter and cfg.tune not in ("lora", "state"):
        raise UserError(
            f"adapter is for --tune=lora or state, not {cfg.tune}; merge it first (export.py merge)"
        )
    if cfg.adapter:
        model.load_tuned(cfg.adapter)
    model.compute_dtype, model.grad_cp = run.dtype, cfg.grad_cp
    model.to(run.device)
    model.prepare_recurrence()
    return model


def is_safetensors(path):
    return Path(path).suffix in (".safetensors", ".st")


def read_metadata(path):
    """The {str: str} that a .safetensors file carries beside its tensors; {} for a .pth."""
    if not is_safetensors(path):
        return {}
    with safe_open(path, "pt") as f:
        return f.metadata() or {}


def read_weights(path):
    """{name: tensor} of a `.pth` or `.safetensors` file."""
    if is_safetensors(path):
        try:
            return load_file(path)
        except (SafetensorError, OSError) as e:
            raise UserError(f"{path} cannot be read as safetensors ({e})") from e
    weights = common.load_torch(path)
    if not isinstance(weights, dict) or not all(
        isinstance(w, torch.Tensor) for w in weights.values()
    ):
        raise UserError(
            f"{path} is not a file of weights (a flat dict of tensors); "
            "last.pt is for resuming, rwkv-*.pth holds weights"
        )
    return weights


def write_weights(weights, path, metadata=None):
    """`.pth` or `.safetensors` by the path's ending, atomically. metadata {str: str}: .safetensors only."""
    if not is_safetensors(path):
        return common.save_torch(weights, path)
    with common.atomic_write(path) as tmp:
        try:
            save_file(weights, tmp, metadata)
        except SafetensorError as e:
            raise OSError(errno.EIO, str(e)) from e


def write_state(state, path, **about):
    """One sequence's state [L, 1, …] as `path`, .pth, exactly what other engines read: blocks.{i}.att.time_state [H, N, N],
    rows = value. Shift vectors that are not zero and `about` go to a .json of the same name."""
    shifts = {
        key: state[key][:, 0].float().tolist()
        for key in ("att_shift", "ffn_shift")
        if state[key].any()
    }
    with common.atomic_write(Path(path).with_suffix(".json")) as tmp:
        tmp.write_text(json.dumps({**about, **shifts}) + "\n")
    common.save_torch(
        {
            f"blocks.{i}.att.time_state": w.float().cpu().clone()
            for i, w in enumerate(state["wkv"][:, 0])
        },
        path,
    )


def read_state(path, config=None):
    """A state file -> (state [L, 1, …], what the .json beside it says or {}). With `config`, an error unless it fits."""
    weights, about = read_weights(path), {}
    names, sizes = (
        [f"blocks.{i}.att.time_state" for i in range(len(weights))],
        {w.shape for w in weights.values()},
    )
    L, size = len(names), [*next(iter(sizes), ())]
    if set(weights) != set(names) or len(sizes) != 1 or len(size) != 3 or size[1] != size[2]:
        raise UserError(
            f"{path} is not a tuned state: expected blocks.{{i}}.att.time_state [H, N, N] for each layer and "
            f"nothing else; it has {L} tensors, {', '.join(list(weights)[:2])} …"
            + (
                "; it looks like a whole model: give it as the model"
                if "emb.weight" in weights
                else ""
            )
        )
    H, N, _ = size
    if config and (L, H, N) != (
        have := (config.n_layer, config.n_embd // config.head_size, config.head_size)
    ):
        raise UserError(
            f"{path} is a state of another model: {L} layers, {H} heads of {N}; "
            f"this one has {have[0]} layers, {have[1]} heads of {have[2]}"
        )
    wkv = torch.stack([weights[name].float() for name in names])[:, None]
    with contextlib.suppress(FileNotFoundError):
        about = json.loads(Path(path).with_suffix(".json").read_text())
    shifts = {
        key: torch.tensor(about.pop(key, [[0.0] * H * N] * L))[:, None]
        for key in ("att_shift", "ffn_shift")
    }
    state = {"wkv": wkv, **shifts}
    for key, value in state.items():
        if not value.isfinite().all():
            raise UserError(
                f"{path} has {int((~value.isfinite()).sum())} values in {key} that are NaN or infinite"
            )
    return state, about


def config_of(weights, path="the file"):
    """RWKVConfig from the tensors' names and shapes, never from a table of sizes."""
    v7 = "blocks.0.att.r_k" in weights
    if not v7 and "blocks.0.att.time_maa_w2" not in weights:
        raise UserError(
            f"{path} is neither RWKV-7 (blocks.0.att.r_k) nor RWKV-6 (blocks.0.att.time_maa_w2); it has "
            f"{', '.join(list(weights)[:3])} …"
        )
    n_layer = 1 + max(
        int(name.split(".")[1]) for name in weights if re.match(r"blocks\.\d+\.", name)
    )
    heads, deeper = (
        "blocks.0.att." + ("r_k" if v7 else "time_faaaa"),
        f"blocks.{min(1, n_layer - 1)}.att.v1",
    )
    places = {
        "vocab_size": ("emb.weight", 0, 2),
        "n_embd": ("emb.weight", 1, 2),
        "n_head": (heads, 0, 2),
        "head_size": (heads, 1, 2),
        "dim_ffn": ("blocks.0.ffn.key.weight", 0, 2),
    }  # name, axis, dimensions
    if v7:
        places |= {
            "decay_rank": ("blocks.0.att.w1", 1, 2),
            "iclr_rank": ("blocks.0.att.a1", 1, 2),
            "gate_rank": ("blocks.0.att.g1", 1, 2),
            "value_rank": (deeper, 1, 2),
        }
        if n_layer == 1 and deeper not in weights:  # never used: any rank will do
            del places["value_rank"]
    else:
        places |= {
            "mix_rank": ("blocks.0.att.time_maa_w2", 1, 3),
            "decay_rank": ("blocks.0.att.time_decay_w1", 1, 2),
        }
    sizes = {}
    for field, (name, axis, dims) in places.items():
        size = weights[name].shape if name in weights else ()
        if len(size) != dims:
            raise UserError(
                f"{path}: {name} is {list(size) if size else 'missing'}, expected {dims} dimensions; "
                "is this a whole RWKV-6 or RWKV-7 file?"
            )
        sizes[field] = size[axis]
    if (n_head := sizes.pop("n_head")) * sizes["head_size"] != sizes["n_embd"]:
        raise UserError(
            f"{path}: {heads} is {n_head} heads of {sizes['head_size']}, but the width is {sizes['n_embd']}"
        )
    return RWKVConfig("x070" if v7 else "x060", n_layer, **sizes)


@torch.no_grad()
def init_parameter(name, p, c):
    """Upstream's initial value for the parameter of this official name, in place; -> p.

    Source: RWKV-LM's RWKV-v7/train_temp (x070) and RWKV-v5 (x060). With l the layer and i the channel:
    d = i / C, x = i / (C - 1), s = l / (L - 1), q = 1 - l / L.
    """
    layer, leaf = (
        (int(found[1]), found[2])
        if (found := re.match(r"blocks\.(\d+)\.(.*)", name))
        else (0, name)
    )
    C, L, N = c.n_embd, c.n_layer, c.head_size
    i = torch.arange(C, dtype=torch.float32)
    d, x, s, q = i / C, i / max(C - 1, 1), layer / max(L - 1, 1), 1 - layer / L
    z = (i % N - (N - 1) / 2) / max((N - 1) / 2, 1e-9)
    zigzag = z * z.abs()
    # how much of the token before: 1 - d ** power
    powers = {
        "att.x_r": 0.2 * q,
        "att.x_w": 0.9 * q,
        "att.x_k": 0.7 * q,
        "att.x_v": 0.7 * q,
        "att.x_a": 0.9 * q,
        "att.x_g": 0.2 * q,
        "ffn.x_k": q**4,
        "att.time_maa_x": q,
        "att.time_maa_w": q,
        "att.time_maa_k": q,
        "att.time_maa_r": 0.5 * q,
        "att.time_maa_g": 0.5 * q,
        "ffn.time_maa_k": q**3,
        "ffn.time_maa_r": q**3,
    }
    values = {
        "att.time_maa_v": 1 - (d**q + 0.3 * s),
        "att.w0": -6 + 6 * x ** (1 + s**0.3) + 0.5 + 2.5 * zigzag,
        "att.a0": -0.19 + 0.3 * zigzag + 0.4 * (x - 0.5),
        "att.v0": 0.73 - 0.4 * (x - 0.5),
        "att.k_k": 0.71 - 0.1 * (x - 0.5),
        "att.k_a": 1.02,
        "att.r_k": -0.04,
        "att.ln_x.weight": ((1 + layer) / L) ** 0.7,
        "att.time_decay": -6 + 5 * x ** (0.7 + 1.3 * s),
        "att.time_faaaa": s * (1 - x) + 0.1 * ((i + 1) % 3 - 1),
    }
    orthogonal = {
        "att.receptance.weight": 1,
        "att.key.weight": 0.1,
        "att.value.weight": 1,
        "ffn.key.weight": 1,
        "att.gate.weight": 0.1,
        "head.weight": 0.5 * max(1, c.vocab_size / C) ** 0.5,
    }
    if leaf in powers:
        return p.copy_((1 - d ** powers[leaf]).reshape(p.shape))
    if leaf in values:
        return p.copy_(
            torch.as_tensor(values[leaf], dtype=torch.float32).expand(p.numel()).reshape(p.shape)
        )
    if leaf in orthogonal or re.fullmatch(r"att\.[wavg]2", leaf):
        return nn.init.orthogonal_(
            p, gain=orthogonal.get(leaf) or 0.1 * max(1, p.shape[0] / p.shape[1]) ** 0.5
        )
    if leaf in ("att.time_maa_w2", "att.time_decay_w2"):
        return p.uniform_(-0.01, 0.01)
    if leaf == "emb.weight":
        return p.uniform_(-1e-4, 1e-4)
    # 1 for norms; 0 for their biases, first halves of low-rank pairs, and what writes into the residual stream
    return p.fill_(1) if re.fullmatch(r"(.*\.)?ln\w*\.weight", leaf) else p.zero_()
