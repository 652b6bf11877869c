"""Runs that are killed at random moments, go on, and end bit for bit as one that nobody stopped.

python tests/campaign/kills.py [case …] [--kills=300] [--how=kill|ctrlc|both] [--seed=0]
    kill: SIGKILL.  ctrlc: two Ctrl-C, one shortly after the other.  both: two starts in one folder,
    of which the second is refused while the first goes on.

A case is a small run of one script. The imports are paid once: every run is a fork of this process,
and a process of its own in all other respects.
"""

import argparse
import contextlib
import importlib
import json
import os
import random
import re
import runpy
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ["OMP_NUM_THREADS"] = "1"

import torch

torch.set_num_threads(1)

from gosling.config import one_line_errors
from gosling.token_files import TokenFileWriter
from gosling.weights import read_weights
from model import RWKV, RWKVConfig

for script in ("self_reward", "train_grpo", "train_pretrain", "sample"):
    importlib.import_module(script)

BATCH = "--micro_bsz=4 --global_bsz=8 --max_steps=24 --save_every=3 --eval_every=4 --log_every=1"
BATCH += " --warmup_steps=3 --lr=1e-3 --lr_final=1e-4 --device=cpu"
MODEL = f"--init_from=W/m.pth --tokenizer=bytes --ctx_len=48 {BATCH}"
CHATS = f"--data=W/chats.jsonl --val_data=W/chats.jsonl --eval_samples=1 {MODEL}"
PAIRS = f"--data=W/pairs.jsonl --val_data=W/pairs.jsonl {MODEL}"
GRPO = f"W/reward.py --data=W/prompts.jsonl {MODEL} --global_bsz=4 --micro_bsz=2"
GRPO += " --num_generations=4 --max_completion_length=8 --steps_per_generation=2"
GRPO += " --num_iterations=2 --eval_every=0"
CASES = {
    "pretrain": f"train_pretrain.py --data=W/text --val_data=W/text --tokenizer=bytes --n_layer=1 "
    f"--n_embd=64 --ctx_len=32 --eval_windows=4 {BATCH}",
    "sft": f"train_sft.py {CHATS}",
    "lora": f"train_sft.py {CHATS} --tune=lora --lora_r=4 --lora_dropout=0.1",
    "state": f"train_state.py {CHATS} --lr=1e-2",
    "reward": f"train_reward.py {PAIRS}",
    "dpo": f"train_dpo.py {PAIRS} --patience=3 --lr=1e-2",
    "grpo": f"train_grpo.py {GRPO} --dynamic_sampling=1 --rollouts_every=4",
    "grpo_lora": f"train_grpo.py {GRPO} --tune=lora --lora_r=4 --beta=0.1",
    "self_reward": "self_reward.py W/stages.py --prompts=W/prompts.jsonl --init_from=W/m.pth "
    "--tokenizer=bytes --device=cpu --max_completion_length=8 --max_prompts=12 --block=4",
    "batch": "sample.py batch W/prompts.jsonl OUT/batch.jsonl --model=W/m.pth --tokenizer=bytes "
    "--n=4 --max_new_tokens=60 --seed=7 --logprobs --batch_size=16 --device=cpu",
}
FUNCTIONS = """
def reward(prompts, completions, **columns):
    return [float(sum(map(ord, text)) % 7) for text in completions]
"""
STAGES = """
from self_reward import external_reward
stages = [external_reward(max_steps=4, micro_bsz=2, global_bsz=2, save_every=1, eval_every=0)] * 2
"""


def make_data(folder):
    torch.manual_seed(0)
    RWKV(RWKVConfig("x070", 1, 64, 257)).save_pretrained(folder / "m.pth")
    with TokenFileWriter(folder / "text", "u2") as f:
        for i in range(40):
            f.add([*((i * j) % 256 + 1 for j in range(100)), 0])
    rows = {"chats": [], "pairs": [], "prompts": []}
    for i in range(32):
        prompt = f"what is {i}"
        rows["prompts"].append({"prompt": prompt})
        rows["pairs"].append({"prompt": prompt, "chosen": f"a {i % 5}", "rejected": f"b {i % 3}"})
        rows["chats"].append({"prompt": prompt, "response": f"it is {i % 7}"})
    for name, some in rows.items():
        text = "".join(json.dumps(row) + "\n" for row in some)
        (folder / f"{name}.jsonl").write_text(text)
    (folder / "reward.py").write_text(FUNCTIONS)
    (folder / "stages.py").write_text(STAGES + FUNCTIONS)


def start(case, data, out):
    """A run of a case, in a process group of its own -> its pid; its output goes to out/log."""
    words = CASES[case].replace("W/", f"{data}/").replace("OUT/", f"{out}/").split()
    if case != "batch":
        words.append(f"--out_dir={out}/run")
    if case not in ("batch", "self_reward"):
        words.append("--resume=auto")
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        log = os.open(out / "log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.chdir(ROOT)
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except BaseException:
        sys.excepthook = one_line_errors
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pid, seconds):
    """The exit status as in subprocess, or None after so many seconds."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def same(one, other):
    """Whether two values of tensors and primitives are equal, bit for bit."""
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other or (one != one and other != other)


def content(path):
    """What a file of a run holds, without times and places; None for what need not be the same."""
    if path.name == "last.pt":
        last = torch.load(path, weights_only=True)
        return {key: last[key] for key in ("model", "optimizer", "rng", "step")}
    if path.suffix in (".pth", ".safetensors"):
        return read_weights(path)
    if path.suffix != ".jsonl":
        return None
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    timed = re.compile("time|tokens_per_s|seconds")
    return [{k: v for k, v in line.items() if not timed.search(k)} for line in lines]


def differences(expected, got):
    """What of a run is not as in the one that nobody stopped."""
    names = [
        {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
        for folder in (expected, got)
    ]
    # last.previous.pt is there from a process's second save on.
    wrong = [name for name in names[0] ^ names[1] if not name.endswith(("log", "previous.pt"))]
    for name in sorted(names[0] & names[1]):
        if not same(content(expected / name), content(got / name)):
            wrong.append(name)
    return wrong


def stop(pid, how, rng):
    """End a run -> what was wrong with its end, or None."""
    if how == "kill":
        os.kill(pid, signal.SIGKILL)
    else:
        os.kill(pid, signal.SIGINT)
        time.sleep(rng.uniform(0, 0.3))
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGINT)
    if wait(pid, 60) is None:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        return "still there after a minute"
    return None


def campaign(case, how, n_stops, seed, data):
    """Stop runs of one case n_stops times -> Counter of what was seen."""
    rng, seen = random.Random(f"{case} {how} {seed}"), Counter()
    whole = data / f"{case}_whole"
    whole.mkdir(exist_ok=True)
    began = time.monotonic()
    assert wait(start(case, data, whole), 600) == 0, (whole / "log").read_text()[-500:]
    seconds = time.monotonic() - began
    while seen["stops"] < n_stops:
        out = data / f"{case}_{how}"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        status = None
        for attempt in range(8):
            pid = start(case, data, out)
            status = wait(pid, 600 if attempt == 7 else rng.uniform(0.02, seconds))
            if status is not None:
                break
            seen["stops"] += 1
            if how == "both":
                second = wait(start(case, data, out), 600)
                seen["second start refused" if second else "second start after the first"] += 1
                status = wait(pid, 600)
                break
            problem = stop(pid, how, rng)
            if problem:
                seen[problem] += 1
        log = (out / "log").read_text(errors="replace")
        seen["tracebacks"] += log.count("Traceback") if how != "ctrlc" else 0
        wrong = differences(whole, out) if status == 0 else [f"status {status}: {log[-200:]}"]
        seen["same bit for bit" if not wrong else f"NOT THE SAME: {wrong[:3]}"] += 1
    return seen


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("cases", nargs="*", default=list(CASES))
    parser.add_argument("--kills", type=int, default=300)
    parser.add_argument("--how", default="kill", choices=["kill", "ctrlc", "both"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    data = Path(tempfile.mkdtemp(prefix="gosling-kills-"))
    make_data(data)
    failed = False
    for case in args.cases:
        seen = campaign(case, args.how, -(-args.kills // len(args.cases)), args.seed, data)
        failed |= any(key.startswith(("NOT", "still")) for key in seen) or seen["tracebacks"] > 0
        print(f"{case}, {args.how}: {dict(seen)}", flush=True)
    shutil.rmtree(data)
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
