"""Every command of README.md and of docs/ that a laptop can run, page by page and in its order.

Each page has a copy of the house to itself, with small stand-ins for the files that it names and
for what an earlier run left; training takes two steps.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys

from gosling import tune, weights
from model import RWKV, RWKVConfig

import numpy as np
import pytest
import torch
from helpers import OFFICIAL, PAGES, ROOT, commands_of, random_model, write

pytestmark = pytest.mark.slow
# GPUs, or minutes, or an extra package
ELSEWHERE = re.compile(
    r"torchrun|^bash |_1b5|_0b1|runs/|tests|^python eval\.py|--serve|^python export\.py (gguf|onnx)"
    r"|--json_schema|--regex|bench/grammar"
    r"|bench/(cpu|kernels|states|zeros)|(memory|gpu)\.py$|--measure|cuda"
)
TRAINING = ["--max_steps=2", "--eval_every=0", "--save_every=0"]
SMALLER = {  # what makes a command short without making it another one
    "tasks.py": ["--prompts=200", "--text_tokens=100000"],
    "train_pretrain.py": TRAINING,
    "train_sft.py": TRAINING,
    "train_state.py": TRAINING,
    "train_reward.py": TRAINING,
    "train_dpo.py": TRAINING,
    "train_grpo.py": ["--max_steps=2"],
    "bench/wkv.py": ["--B=1", "--T=32", "--rounds=1"],
    "bench/train_vs_gpt.py": ["--ctx=32", "--bsz=1", "--rounds=1"],
    "bench/compile.py": ["--n_layer=1", "--n_embd=64", "--ctx=16", "--rounds=1"],
    "bench/packing.py": ["--longest=64", "--rounds=1"],
    "bench/forks.py": ["--prompt=16", "--answer=8", "--rounds=1"],
    "bench/judge.py": ["--answers=4", "--rounds=1"],
    "bench/generate.py": ["--tokens=16", "--prompt=16", "--rounds=1"],
    "bench/memory.py": ["--n_layer=2", "--n_embd=64", "--vocab=256"],
}


# ----------------------------------------------------------------------------------------------
# the commands of a page


def runnable(page):
    return [command for command in commands_of(page) if not ELSEWHERE.search(command)]


def run(command, house):
    """One command of a page, made small -> the completed process."""
    words = shlex.split(command, comments=True)
    script = next(word for word in words if word.endswith(".py"))
    words = [sys.executable, *words[1:]]
    given = {word.split("=")[0] for word in words}
    if not given & {"--epochs", "--score", "pairs", "--model"}:
        words += SMALLER.get(script, [])
    if "--n_embd=768" in words:
        words += ["--n_layer=1", "--n_embd=64"]
    if script == "sample.py":
        words.append("--max_new_tokens=8")
    if script.startswith(("train", "sample", "self")):
        words.append("--device=cpu")
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        words, cwd=house, env=env, capture_output=True, text=True, input="hi\n\n", timeout=600
    )


# ----------------------------------------------------------------------------------------------
# the house


def copy_of_the_house(folder):
    """All files that git has, with a config and a measurement that are smaller."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    for name in listed.stdout.split():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    change(folder / "tasks.py", ("rows=1000", "rows=40"))
    # After two steps no answer is right, and no judge is sure.
    change(
        folder / "config/self_reward_tiny.py",
        ("3200", "48"),
        ("choose_pair=voted, ", ""),
        ("tasks.check(", "(lambda _, text: len(text) % 2)("),
    )
    rounds = folder / "config/self_reward_tiny.py"
    rounds.write_text(re.sub(r"max_steps=\d+", "max_steps=2", rounds.read_text()))


def change(path, *replacements):
    text = path.read_text(encoding="utf-8")
    for old, new in replacements:
        assert old in text, (path, old)
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")


def what_a_reader_brings(folder):
    """The files of docs/commands.md, small."""
    RWKV(RWKVConfig("x070", 2, 64, 65536)).save_pretrained(folder / OFFICIAL, dtype=torch.bfloat16)
    chats, prefs = [], []
    for i in range(64):
        turns = [{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}!"}]
        chats.append({"messages": turns})
        prefs.append({"prompt": f"say {i}", "chosen": f" {i}!", "rejected": " no", "margin": 0.5})
    write(folder / "my_text.jsonl", *[{"text": "once upon a time " * 40}] * 100)
    write(folder / "chats.jsonl", *chats)
    write(folder / "books.jsonl", *[{"text": "a long story, " * 60}] * 32)
    write(folder / "prefs.jsonl", *prefs)
    write(folder / "answers.jsonl", *[{"prompt": "say 1", "completions": ["1!", "no"]}] * 3)
    write(folder / "prompts.jsonl", *[{"prompt": f"say {i}"} for i in range(3)])
    np.save(folder / "angles.npy", np.arange(6400).reshape(100, 64) % 360)


def what_the_small_runs_left(folder):
    """data/tasks*, out/*_tiny and out/demo, as runs/demo.sh leaves them, of untrained models."""
    for command in (
        "python tasks.py --out=data/tasks",
        "python prepare.py data/tasks_text.jsonl --out=data/tasks --tokenizer=bytes --val=0.01",
    ):
        done = run(command, folder)
        assert done.returncode == 0, done.stderr
    answered = []
    for line in (folder / "data/tasks_prompts.jsonl").read_text().splitlines():
        row = json.loads(line)
        answered.append({**row, "completions": [{"text": f" {row['answer']}"}, {"text": " no"}]})
    demo = folder / "out/demo"
    (demo / "samples").mkdir(parents=True)
    write(demo / "samples/answers.jsonl", *answered)
    for out in ("data/tasks_pairs", "out/demo/samples/pairs"):
        done = run(f"python tasks.py pairs out/demo/samples/answers.jsonl --out={out}", folder)
        assert done.returncode == 0, done.stderr
    (demo / "data").mkdir()
    for path in (folder / "data").glob("tasks[_.]*"):
        shutil.copy(path, demo / "data" / path.name)
        shutil.copy(path, path.with_name(path.name.replace("tasks", "tasks1", 1)))
    leave_models(folder)


def leave_models(folder):
    """Weights, a state and a reward model in the folders of the small runs and of the demo."""
    model = random_model("x070", n_layer=5, n_embd=64, vocab_size=257)
    names = ["pretrain_tasks", "sft_tiny", "dpo_tiny", "grpo_tiny"]
    names += [f"demo/{name}" for name in ("pretrain", "sft", "more", "dpo", "grpo")]
    for name in names:
        model.save_pretrained(folder / "out" / name / "rwkv-final.pth")
    about = {
        "fingerprint": weights.fingerprint(model),
        "model": "../sft/rwkv-final.pth",
        "tokenizer": "bytes",
    }
    model.set_tune("state")
    tune.save_state(model, folder / "out/demo/state/state-final.pth", **about)
    about["model"] = "../sft_tiny/rwkv-final.pth"
    tune.save_state(model, folder / "out/state_tiny/state-final.pth", **about)
    model.set_tune("full")
    model.add_score()
    for name in ("reward_tiny", "demo/reward"):
        model.save_pretrained(folder / "out" / name / "rwkv-final.pth")
    for path in folder.glob("out/**/*-final.pth"):
        path.with_name("config.json").write_text('{"tokenizer": "bytes"}\n')


@pytest.fixture(scope="module")
def house(tmp_path_factory):
    folder = tmp_path_factory.mktemp("house")
    torch.manual_seed(0)
    copy_of_the_house(folder)
    what_a_reader_brings(folder)
    what_the_small_runs_left(folder)
    return folder


# ----------------------------------------------------------------------------------------------


PAGES_TO_RUN = [page for page in PAGES if runnable(page)]


@pytest.mark.parametrize("page", PAGES_TO_RUN, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_command_runs(page, house, tmp_path):
    shutil.copytree(house, tmp_path, dirs_exist_ok=True)
    for command in runnable(page):
        done = run(command, tmp_path)
        assert done.returncode == 0, f"{command}\n{done.stdout[-1500:]}\n{done.stderr[-1500:]}"
        if "tasks.py pairs" in command and "out/demo" not in command:
            # Of answers none of which is right there are no pairs: those from before again.
            for name in ("tasks_pairs.jsonl", "tasks_pairs_val.jsonl"):
                shutil.copy(house / "data" / name, tmp_path / "data" / name)


def test_there_are_commands():
    assert sum(len(runnable(page)) for page in PAGES) > 35


def test_a_page_is_read_as_a_reader_reads_it(tmp_path):
    """Long commands, other blocks, comments, prose that begins with a command's name or has one."""
    page = tmp_path / "page.md"
    page.write_text(
        "python is a language.\n```sh\n# python no.py\npython a.py --x=1 \\\n    --y=2\n"
        "pip install b\n```\n```diff\n- python c.py\n```\npython is not run\n"
        "```bash\ntorchrun d.py\npython a.py --x=1 --y=2\n```\n"
        "`python e.py`, `python bench/f.py\n--z`\n"
    )
    assert commands_of(page) == [
        "python a.py --x=1 --y=2",
        "torchrun d.py",
        "python bench/f.py --z",
    ]
    assert runnable(page) == ["python a.py --x=1 --y=2", "python bench/f.py --z"]
