"""Every command of README.md that a laptop can run, in its order, in a copy of the house, on small
stand-ins for the files that it names; training takes two steps."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

from model import RWKV, RWKVConfig

import numpy as np
import pytest
import torch
from helpers import ROOT, readme, readme_commands

pytestmark = pytest.mark.slow
TABLES = [c for c in re.findall(r"`(python [^`]*)`", readme()) if "bench/" not in c]
ELSEWHERE = re.compile(
    r"torchrun|^bash |_1b5|_0b1|demo\.py|^python eval\.py"
)  # GPUs, or minutes, or an extra package
SMALLER = {  # what makes a command short without making it another one
    "tasks.py": ["--prompts=200", "--text_tokens=100000"],
    "train_grpo.py": ["--max_steps=2"],
    "self_reward.py": [],
    **{
        f"train_{name}.py": ["--max_steps=2", "--eval_every=0", "--save_every=0"]
        for name in ("pretrain", "sft", "state", "reward", "dpo")
    },
}


def jsonl(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    folder = tmp_path_factory.mktemp("house")
    files = subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split()
    for name in files:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    torch.manual_seed(0)
    RWKV(RWKVConfig("x070", 1, 64, 65536)).save_pretrained(
        folder / "RWKV-x070-World-0.1B.pth", dtype=torch.bfloat16
    )
    chats = [
        {
            "messages": [
                {"role": "user", "content": f"say {i}"},
                {"role": "assistant", "content": f"{i}!"},
            ]
        }
        for i in range(64)
    ]
    jsonl(folder / "my_text.jsonl", [{"text": "once upon a time " * 40}] * 100)
    jsonl(folder / "chats.jsonl", chats)
    jsonl(folder / "books.jsonl", [{"text": "a long story, " * 400}] * 32)
    jsonl(
        folder / "prefs.jsonl",
        [
            {"prompt": f"say {i}", "chosen": f" {i}!", "rejected": " no", "margin": 0.5}
            for i in range(64)
        ],
    )
    jsonl(folder / "answers.jsonl", [{"prompt": "say 1", "completions": ["1!", "no"]}] * 3)
    jsonl(folder / "prompts.jsonl", [{"prompt": f"say {i}"} for i in range(3)])
    np.save(folder / "angles.npy", np.arange(6400).reshape(100, 64) % 360)
    rounds = folder / "config/self_reward_tiny.py"
    text = re.sub(
        r"max_steps=\d+",
        "max_steps=2",
        rounds.read_text().replace("3200", "48").replace("choose_pair=voted, ", ""),
    )
    rounds.write_text(
        text.replace("tasks.check(", "(lambda _, text: len(text) % 2)(")
    )  # after two steps nothing is right
    return folder


def run(words, house):
    script = next(w for w in words if w.endswith(".py"))
    words = [sys.executable, *words[1:]]
    if (
        not {w.split("=")[0] for w in words} & {"--epochs", "--score", "pairs"}
        and script in SMALLER
    ):
        words += SMALLER[script]
    words += ["--n_layer=1", "--n_embd=64"] * ("--n_embd=768" in words)
    words += ["--max_new_tokens=8"] * (script == "sample.py") + ["--device=cpu"] * (
        script.startswith(("train", "sample", "self"))
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        words, cwd=house, env=env, capture_output=True, text=True, input="hi\n\n", timeout=600
    )


def test_every_command_runs(house):
    ran = []
    for command in dict.fromkeys([*readme_commands(), *TABLES]):
        if ELSEWHERE.search(command):
            continue
        done = run(shlex.split(command, comments=True), house)
        assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
        ran.append(command)
        if "tasks.py pairs" in command:  # of answers none of which is right there are none
            for name in ("tasks_pairs", "tasks_pairs_val"):
                shutil.copy(house / "prefs.jsonl", house / f"data/{name}.jsonl")
    assert len(ran) > 35, ran
