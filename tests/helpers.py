"""What several test files use. Tests import helpers from here, never from each other."""

import copy
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

from gosling import config, runs
from gosling.token_files import TokenFileWriter
from gosling.tune import write_tuned
from gosling.weights import read_metadata, read_weights, write_weights
from model import RWKV, RWKVConfig

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
IN_INTERPRETER = os.environ.get("TRITON_INTERPRET") == "1"  # Triton's, on a CPU

SMALL = dict(n_layer=3, n_embd=128, vocab_size=320)
# Ranks that no table of sizes holds.
RANKS = {
    "x070": dict(decay_rank=24, iclr_rank=40, value_rank=8, gate_rank=56),
    "x060": dict(mix_rank=16, decay_rank=48),
}
# Prompts with two answers each: (prompt_ids, [answer_ids, answer_ids]).
GROUPS = [
    ([5, 9, 3, 8, 1, 7, 2], [[4, 4, 0], [6, 2, 9, 1, 0]]),
    ([7], [[3, 0], [1, 1, 1, 0]]),
    (list(range(40, 80)), [[9] * 20, [8, 0]]),
]
# What tokenizers and chat templates may get wrong: blanks, quotes, several alphabets.
TEXT = "Hello!  Two spaces,\n\n\ttabs. 今天是美好的一天。 наука 🎉 it's \"x\" 'y' \\n\n\n-\n"
CHAT = [
    {"role": "system", "content": "Be kind.\n\n\nAlways. "},
    {"role": "user", "content": " Hi\nthere"},
    {"role": "assistant", "content": "Hello!\n\nYes?"},
    {"role": "user", "content": "Go on."},
]

# Of a policy loss: 5 rows of up to 6 tokens, one masked whole, one with a hole.
A = [1.2, -0.7, 0.4, -1.5, 0.9]
MASK = [
    [1, 1, 1, 0, 0, 0],
    [1, 1, 1, 1, 1, 1],
    [0, 0, 0, 0, 0, 0],
    [1, 0, 1, 1, 0, 0],
    [1, 0, 0, 0, 0, 0],
]
g = torch.Generator().manual_seed(3)
LP, REF, OLD, SAID = (
    -2 + scale * torch.randn(5, 6, dtype=torch.float64, generator=g)
    for scale in (0.6, 0.6, 0.6, 0.6)
)
OLD = LP + 0.5 * (OLD + 2)  # ratios of 0.5 to 2, most of them outside of the clip range
SAID = OLD + 0.8 * (SAID + 2)
REDUCTIONS = ("grpo", "bnpo", "dr_grpo", "dapo", "cispo")


# ----------------------------------------------------------------------------------------------
# models and data


def random_model(version, seed=0, scale=0.1, **sizes):
    """A model whose every tensor matters: upstream's start (most paths zero) plus noise."""
    torch.manual_seed(seed)
    model = RWKV(RWKVConfig(version, **{**SMALL, **sizes}))
    with torch.no_grad():
        for name, p in model.named_parameters():
            is_matrix = p.dim() == 2 and ".weight" in name
            p += torch.randn_like(p) * (0.02 if is_matrix else scale)
    return model


def tune(model, tasks=1, scale=0.3, **options):
    """The model with random tuned states."""
    model.set_tune("state", tasks=tasks, **options)
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for p in model.tuned.parameters():
            if p.requires_grad:
                p.copy_(torch.randn(p.shape, generator=g) * scale)
    return model


def lora(model, path, about=None, **options):
    """An adapter that matters, saved with what it says of itself; -> a model with it on."""
    model = copy.deepcopy(model).eval()
    model.set_tune("lora", **options)
    with torch.no_grad():
        for p in model.parameters():
            if p.requires_grad:
                p += 0.05 * torch.randn_like(p)
    written = write_tuned(model, path.parent, "trained", about=about)
    write_weights(read_weights(written), path, read_metadata(written))  # a .pth carries no metadata
    written.unlink()
    return model


def run_in_tritons_interpreter(file, at_least):
    """A test file in a process whose Triton interprets: it must be told before it is imported."""
    if IN_INTERPRETER:
        pytest.skip("this is its process")
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", file]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    environment.pop("PYTEST_XDIST_WORKER", None)
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert int(re.search(r"(\d+) passed", done.stdout)[1]) >= at_least, done.stdout


def trained_gradient(model):
    """The gradient of all that trains, as one vector."""
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


def documents(n, seed=0, longest=40, vocab=320):
    """Ragged (ids, mask) with two trained stretches each."""
    g = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(n):
        T = int(torch.randint(4, longest, (1,), generator=g))
        ids = torch.randint(0, vocab, (T,), generator=g).tolist()
        mask = [int(i % 5 > 2) for i in range(T)]
        mask[-1] = 1
        found.append((ids, mask))
    return found


def write(path, *rows):
    """A JSONL file; a row that is text is written as it is."""
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("".join(line + "\n" for line in lines))
    return path


# ----------------------------------------------------------------------------------------------
# runs


def rows(out):
    """metrics.jsonl of a run."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def command(script, cfg, *flags, nproc=1, config_file=None):
    """The command line of a script with this config, on top of a config file's functions."""
    values = config.config_dict(cfg).items()
    given = [f"--{key}={value}" for key, value in values if value not in (None, "()", "")]
    launch = [sys.executable]
    if nproc > 1:
        launch += ["-m", "torch.distributed.run", f"--nproc_per_node={nproc}", "--master_port"]
        # After "--", else torchrun's parser takes --log for its own.
        launch += [str(29500 + os.getpid() % 1000), "--"]
    files = [config_file] if config_file else []
    return [*launch, script, *files, *given, *flags]


def torchrun(script, cfg, *flags, nproc=1, config_file=None):
    """The script in processes of its own -> the completed process."""
    line = command(script, cfg, *flags, nproc=nproc, config_file=config_file)
    return subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=300)


def kill_after(cfg, steps, main):
    """Run cfg in this process and stop it, as SIGTERM does, once so many steps are done."""
    real = runs.Metrics.log

    def log(self, step, **values):
        real(self, step, **values)
        if step == steps:
            os.kill(os.getpid(), signal.SIGTERM)

    runs.Metrics.log = log
    try:
        with pytest.raises(SystemExit) as e:
            main(cfg)
        assert e.value.code == 130
    finally:
        runs.Metrics.log = real


# ----------------------------------------------------------------------------------------------
# the same small run of every script

REWARD = '''
def reward(prompts, completions, **columns):
    """How many of a few letters there are; another length of text, another number."""
    return [sum(c in "aeiou0123" for c in text) / 8 for text in completions]
'''

COMMON = dict(
    tokenizer="bytes",
    device="cpu",
    micro_bsz=2,
    global_bsz=8,
    max_steps=20,
    lr=1e-3,
    adam_eps=1e-4,  # with upstream's 1e-18 Adam makes a full step of a gradient of rounding errors
    eval_every=10,
    save_every=0,
    log_every=1,
    grad_clip=0.3,
)


def make_files(folder):
    """Small models and data of every kind."""
    for version in ("x070", "x060"):
        model = random_model(version, n_layer=2, n_embd=64, vocab_size=257)
        model.save_pretrained(folder / f"{version}.pth")
        model.add_score()
        torch.nn.init.normal_(model.score.weight)
        model.save_pretrained(folder / f"{version}-score.pth")
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    chats = [
        {
            "messages": [
                {"role": "user", "content": w * (1 + i % 4)},
                {"role": "assistant", "content": w[::-1]},
            ]
        }
        for i, w in enumerate(words * 3)
    ]
    write(folder / "sft.jsonl", *chats[:20])
    write(folder / "val.jsonl", *chats[20:27])  # the processes get different numbers of batches
    pairs = [
        {"prompt": w * (1 + i % 3), "chosen": w[::-1] * (1 + i % 2), "rejected": w}
        for i, w in enumerate(words * 2)
    ]
    write(folder / "pairs.jsonl", *pairs[:16])
    write(folder / "val_pairs.jsonl", *pairs[15:])
    write(folder / "prompts.jsonl", *({"prompt": w} for w in words))
    (folder / "reward.py").write_text(REWARD)
    (folder / "empty.py").write_text("")
    text = (ROOT / "LICENSE").read_bytes()
    for name, part in (("text_train", text[:800]), ("text_val", text[800:950])):
        with TokenFileWriter(folder / name, np.uint16) as file:
            file.add([byte + 1 for byte in part])
    return folder


def config_of(base, script, version, out, **over):
    """One run's settings."""
    cfg = {**COMMON, "out_dir": str(out)}
    data = {
        "train_sft": ("sft.jsonl", "val.jsonl"),
        "train_state": ("sft.jsonl", "val.jsonl"),
        "train_reward": ("pairs.jsonl", "val_pairs.jsonl"),
        "train_dpo": ("pairs.jsonl", "val_pairs.jsonl"),
        "train_grpo": ("prompts.jsonl", "prompts.jsonl"),
        "train_pretrain": ("text_train", "text_val"),
    }[script]
    cfg |= dict(zip(("data", "val_data"), (str(base / name) for name in data), strict=True))
    if script == "train_pretrain":
        cfg |= dict(n_layer=2, n_embd=64, version=version, ctx_len=32)
    else:
        cfg["init_from"] = str(base / f"{version}.pth")
    if script == "train_grpo":
        cfg |= dict(num_generations=4, max_completion_length=6, global_bsz=4, beta=0.05)
    return {**cfg, **over}


# ----------------------------------------------------------------------------------------------
# README.md and the pages of docs/

OFFICIAL = "weights/rwkv7-g1a-1.5b-20250922-ctx4096.pth"  # what the pages call $MODEL
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def page_name(page):
    """What a page is called in a test's id: its path from the root."""
    return page.relative_to(ROOT).as_posix()


def blocks_of(page, *languages):
    """The texts of a page's fenced blocks that are marked with one of these languages."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M)
    return [block for language, block in blocks if language in languages]


def commands_of(page):
    """The command lines in a page's blocks, a line that ends in a backslash with the next one.

    Then those in its text: of README all, of docs/ the measurements.
    """
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    text = text.replace(".venv/bin/", "").replace("$MODEL", OFFICIAL)
    commands = []
    for language, block in re.findall(r"^```(\w*)\n(.*?)^```", text, re.S | re.M):
        if language in ("sh", "bash", ""):
            lines = [" ".join(line.split("  #")[0].split()) for line in block.splitlines()]
            commands += [line for line in lines if re.match(r"(python|torchrun|bash) ", line)]
    in_text = r"`(python [^`]*)`" if page == PAGES[0] else r"`(python bench/[^`]*)`"
    commands += [" ".join(command.split()) for command in re.findall(in_text, text)]
    return list(dict.fromkeys(commands))


def readme():
    return PAGES[0].read_text(encoding="utf-8")
