"""Clients that stream from the server against the engine's own batch, as a ratio in the same run.

python bench/serve.py                                     # 32 clients, 12 x 768, one thread
python bench/serve.py --n_layer=2 --n_embd=64 --vocab=512 # where HTTP is most of the work

The clients are a process of their own. Two ratios: of this process's CPU time, in which the threads
of the server are part, and of the time on the wall, which other work on the machine disturbs.
"""

import http.client
import json
import multiprocessing
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import sample
from gosling import config, engine, serve
from gosling.tokenizer import load_tokenizer
from model import RWKV, RWKVConfig

import timer


@dataclass
class Config:
    n_layer: int = 12  # layers
    n_embd: int = 768  # width
    vocab: int = 65536  # vocabulary
    clients: int = 32  # at once
    prompt: int = 16  # tokens of each prompt
    tokens: int = 64  # new tokens of each client
    rounds: int = 3  # counted runs of each side
    threads: int = 1  # CPU threads of the engine


def stream(port, body):
    """One client -> how many tokens it got, by the last event's count"""
    connection = http.client.HTTPConnection("127.0.0.1", port)
    connection.request("POST", "/v1/completions", body)
    events = [line for line in connection.getresponse() if line.startswith(b"data: {")]
    return json.loads(events[-1][len("data: ") :])["usage"]["completion_tokens"]


def all_clients(port, bodies):
    """-> the tokens of all clients, who ask at once"""
    with ThreadPoolExecutor(len(bodies)) as pool:
        return sum(pool.map(stream, [port] * len(bodies), bodies))


def main(cfg):
    torch.set_num_threads(cfg.threads)
    torch.manual_seed(0)
    model = RWKV(RWKVConfig("x070", cfg.n_layer, cfg.n_embd, cfg.vocab)).eval()
    tokenizer = load_tokenizer(f"integers:{cfg.vocab - 2}")
    prompts = torch.randint(1, cfg.vocab, (cfg.clients, cfg.prompt)).tolist()
    options = dict(max_new_tokens=cfg.tokens, stop_ids=(), tokenizer=tokenizer, seed=0)
    common = dict(model="m", max_tokens=cfg.tokens, stream=True)
    common |= dict(stream_options={"include_usage": True})
    bodies = [json.dumps({**common, "prompt": ids, "seed": i}) for i, ids in enumerate(prompts)]
    defaults = sample.options_of(sample.Config(batch_size=cfg.clients), tokenizer)
    made = {"batch": [], "served": []}

    def batch():
        completions = engine.generate(model, prompts, batch_size=cfg.clients, **options)
        made["batch"].append(sum(len(c.tokens) for c in completions))

    server = serve.Server(("127.0.0.1", 0), model, {"m": None}, defaults)
    threading.Thread(target=server.run, daemon=True).start()
    with multiprocessing.get_context("spawn").Pool(1) as elsewhere:

        def served():
            made["served"].append(elsewhere.apply(all_clients, (server.port, bodies)))

        sides = {"batch": batch, "served": served}
        seconds = timer.interleaved(sides, cfg.rounds, timer.cpu_and_wall)
    server.should_exit = True
    speed = {name: np.array(made[name][1:])[:, None] / seconds[name] for name in sides}
    timer.report(
        "serve",
        n_layer=cfg.n_layer,
        n_embd=cfg.n_embd,
        vocab=cfg.vocab,
        clients=cfg.clients,
        tokens=cfg.tokens,
        batch_tokens_per_s=timer.median(speed["batch"], 1),
        served_tokens_per_s=timer.median(speed["served"], 1),
        cpu_and_wall_ratio=timer.median(speed["served"] / speed["batch"], 2),
    )


if __name__ == "__main__":
    main(config.read_flags(Config))
