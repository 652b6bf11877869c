"""Peak memory of fine-tuning, each case in a process of its own (VmHWM), as ratios.

    python bench/memory.py           # LoRA to full tuning at 12 x 768; 64 K tokens to 4 K at the same chunk_len
"""
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import common  # noqa: E402

CASE = """
import sys, torch
from model import RWKV, RWKVConfig
from train_sft import backward, pack
tune, n_layer, n_embd, vocab, T, chunk_len = sys.argv[1], *map(int, sys.argv[2:])
torch.set_num_threads(1)
with torch.device("meta"):
    model = RWKV(RWKVConfig("x070", n_layer, n_embd, vocab))
model.to_empty(device="cpu")
for p in model.parameters():
    p.data.normal_(std=0.02)
model.set_tune(tune, **({} if tune == "full" else dict(r=32)))
opt = torch.optim.AdamW(model.param_groups(1e-4, 0.0), fused=True)
for step in range(2):
    ids = torch.randint(0, vocab, (T + 1,)).tolist()
    x, y, weight, borders = pack([(ids, [1] * len(ids))])
    loss, _ = backward(model, x, y, weight / T, borders, chunk_len)
    opt.step()
    opt.zero_grad()
print(open("/proc/self/status").read())
"""


@dataclass
class Config:
    chunk_len: int = 1024  # of the long-context pair


def peak(*args):
    """MiB of a process that takes two optimiser steps."""
    done = subprocess.run([sys.executable, "-c", CASE, *map(str, args)], cwd=ROOT, capture_output=True, text=True, check=True)
    return int(re.search(r"VmHWM:\s+(\d+)", done.stdout)[1]) / 1024


def main(cfg):
    about = dict(date=str(date.today()), device=common.cpu_name(), torch=common.torch.__version__)
    lora, full = (peak(tune, 12, 768, 65536, 128, 0) for tune in ("lora", "full"))
    print(json.dumps(dict(bench="memory", case="lora to full, 12 x 768, vocabulary 65536, ctx 128, one document",
                          lora_mib=round(lora), full_mib=round(full), ratio=round(lora / full, 3), **about)), flush=True)
    short, long = (peak("full", 4, 256, 4096, T, cfg.chunk_len) for T in (4096, 65536))
    print(json.dumps(dict(bench="memory", case=f"65,536 tokens to 4,096, 4 x 256, chunk_len {cfg.chunk_len}, exact gradient",
                          short_mib=round(short), long_mib=round(long), ratio=round(long / short, 3), **about)), flush=True)


if __name__ == "__main__":
    main(common.read_flags(Config))
