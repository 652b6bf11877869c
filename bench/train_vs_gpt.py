"""Training speed of RWKV-7 and RWKV-6 as a ratio to an equal-size GPT, in the same run.

    python bench/train_vs_gpt.py               # CPU, one thread, process CPU time; JSON lines
    python bench/train_vs_gpt.py --device=cuda --n_layer=12 --n_embd=768 --ctx=1024 --bsz=16 \\
        --vocab=50304

The GPT is the plain modern one: pre-norm, learned positions, PyTorch's causal
scaled_dot_product_attention, GELU 4 C feed-forward, no biases. A step is forward, loss, backward
and AdamW (fused), float32 on a CPU, bf16 on a GPU. On a CPU the GPT runs with PyTorch's own
products and with those that gosling takes there, and the ratio is to the faster one.
"""

import functools
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from gosling import config, runs
from model import RWKV, RWKVConfig
from wkv_cuda import fused

import timer


@dataclass
class Config:
    device: str = "cpu"  # cpu or cuda
    n_layer: int = 4  # layers of both networks
    n_embd: int = 256  # width of both
    vocab: int = 4096  # vocabulary of both
    ctx: int = 0  # context length; 0 = the pair of the README: 512 x 8 and 4096 x 1
    bsz: int = 8  # rows, with ctx
    rounds: int = 7  # counted steps of each, interleaved
    threads: int = 1  # CPU threads


class GPT(nn.Module):
    """linear: the class of its products, as nn.Linear, without a bias."""

    def __init__(self, L, C, V, ctx, linear):
        super().__init__()
        self.tok, self.pos = nn.Embedding(V, C), nn.Embedding(ctx, C)
        self.head = linear(C, V)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                dict(
                    ln1=nn.LayerNorm(C),
                    qkv=linear(C, 3 * C),
                    out=linear(C, C),
                    ln2=nn.LayerNorm(C),
                    up=linear(C, 4 * C),
                    down=linear(4 * C, C),
                )
            )
            for _ in range(L)
        )
        self.ln = nn.LayerNorm(C)

    def forward(self, idx, targets):
        B, T = idx.shape
        x = self.tok(idx) + self.pos.weight[:T]
        for b in self.blocks:
            q, k, v = b["qkv"](b["ln1"](x)).view(B, T, 3, -1, 64).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + b["out"](y.transpose(1, 2).flatten(2))
            x = x + b["down"](F.gelu(b["up"](b["ln2"](x))))
        return F.cross_entropy(self.head(self.ln(x)).flatten(0, 1).float(), targets.flatten())


class OwnLinear(nn.Linear):
    """With the products that gosling takes."""

    def forward(self, x):
        return fused.linear(x, self.weight)


def gpt_loss(model, x, y):
    with torch.autocast("cuda", torch.bfloat16, enabled=x.is_cuda):
        return model(x, y)


def rwkv_loss(model, x, y):
    return -model(x, targets=y)[0].logps.mean()


def train_step(model, opt, loss_of, idx):
    loss_of(model, idx[:, :-1], idx[:, 1:]).backward()
    opt.step()
    opt.zero_grad()


def compare(cfg, ctx, bsz):
    torch.manual_seed(0)
    cuda = cfg.device.startswith("cuda")
    idx = torch.randint(0, cfg.vocab, (bsz, ctx + 1), device=cfg.device)
    models = {}
    for name, linear in (("gpt", nn.Linear), ("gpt, gosling's products", OwnLinear)):
        without_bias = functools.partial(linear, bias=False)
        models[name] = GPT(cfg.n_layer, cfg.n_embd, cfg.vocab, ctx, without_bias)
    for version in ("x070", "x060"):
        models[version] = RWKV(RWKVConfig(version, cfg.n_layer, cfg.n_embd, cfg.vocab))
        models[version].compute_dtype = torch.bfloat16 if cuda else torch.float32
    steps = {}
    for name, model in models.items():
        model.to(cfg.device)
        opt = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.99), fused=True)
        loss_of = gpt_loss if name.startswith("gpt") else rwkv_loss
        steps[name] = functools.partial(train_step, model, opt, loss_of, idx)
    clock = timer.gpu if cuda else time.process_time
    seconds = timer.interleaved(steps, cfg.rounds, clock, warm_ups=2)
    gpts = [name for name in models if name.startswith("gpt")]
    gpt = min(gpts, key=lambda name: timer.median(seconds[name], 6))
    params = {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    for version in ("x070", "x060"):
        timer.report(
            "train_vs_gpt",
            version=version,
            ctx=ctx,
            bsz=bsz,
            n_layer=cfg.n_layer,
            n_embd=cfg.n_embd,
            vocab=cfg.vocab,
            params=params[version],
            gpt_params=params[gpt],
            tokens_per_s=round(timer.median(bsz * ctx / seconds[version], 0)),
            gpt_tokens_per_s={
                name: round(timer.median(bsz * ctx / seconds[name], 0)) for name in gpts
            },
            ratio=timer.median(seconds[gpt] / seconds[version], 3),
            products="oneDNN" if fused.ONEDNN and not cuda else "PyTorch's",
            device=torch.cuda.get_device_name() if cuda else runs.cpu_name(),
        )


def main(cfg):
    torch.set_num_threads(cfg.threads)
    fused.keep_memory()  # as the train scripts do; both sides gain
    for ctx, bsz in [(cfg.ctx, cfg.bsz)] if cfg.ctx else [(512, 8), (4096, 1)]:
        compare(cfg, ctx, bsz)


if __name__ == "__main__":
    main(config.read_flags(Config))
