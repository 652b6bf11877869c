"""Every method on one small family of tasks, each from the one before: what runs/demo.sh runs.

Two stages at a time, one thread each, as far as they do not wait for each other; a row of the table
as each ends; at the end results.jsonl and report.html in out/demo. A stage that is there is not run
again; one that was cut off goes on, or begins anew.
"""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from gosling.config import read_flags
from gosling.files import read_json, whole_lines, write_json, write_jsonl
from gosling.metrics import duration
from runs import report


@dataclass
class Config:
    mode: tyro.conf.Positional[Literal["full", "quick"]] = "full"  # quick: fewer steps
    version: Literal["x070", "x060"] = "x070"  # x060: pretraining, SFT, state tuning of an RWKV-6
    seed: int = 42  # of every stage
    out: str = "out/demo"  # a folder for each stage, and the report


@dataclass
class Stage:
    name: str
    what: str  # its row in the table
    short: str  # over its column in the report
    after: tuple = ()  # names of stages that it needs
    commands: list = field(default_factory=list)
    metric: str = "exact_match"  # of metrics.jsonl: first and last
    threads: int = 1  # 2 where no other stage can run beside it
    expect: tuple = ()  # its end's lowest and highest, of all seeds that were tried, and a bit more
    is_control: bool = False  # there to be compared with
    seconds: float = 0.0
    values: tuple = ()  # of the metric: before, after


# ----------------------------------------------------------------------------------------------
# the stages


def train(cfg, script, stage, config, *flags):
    """The command line of a training script whose folder is the stage's."""
    return [
        f"train_{script}.py",
        f"config/{config}.py",
        f"--out_dir={cfg.out}/{stage}",
        f"--seed={cfg.seed}",
        *flags,
    ]


def choose(cfg, full, quick):
    """What the mode says."""
    return full if cfg.mode == "full" else quick


def steps(cfg, full, quick):
    return f"--max_steps={choose(cfg, full, quick)}"


def sft_data(cfg):
    tasks = f"{cfg.out}/data/tasks"
    return f"--data={tasks}_sft.jsonl", f"--val_data={tasks}_sft_val.jsonl"


def pairs_data(cfg):
    pairs = f"{cfg.out}/samples/pairs"
    return f"--data={pairs}.jsonl", f"--val_data={pairs}_val.jsonl"


def from_sft(cfg):
    return f"--init_from={cfg.out}/sft/rwkv-final.pth"


def data(cfg):
    tasks = f"{cfg.out}/data/tasks"
    n_prompts = choose(cfg, 6400, 3200)
    commands = [
        ["tasks.py", f"--out={tasks}", f"--prompts={n_prompts}"],
        ["prepare.py", f"{tasks}_text.jsonl", f"--out={tasks}", "--tokenizer=bytes", "--val=0.01"],
    ]
    if cfg.mode == "full":  # fresh prompts for the second round of self-rewarding
        commands.append(["tasks.py", "--seed=1", "--out=data/tasks1"])
    return Stage("data", "tasks, text to pretrain on", "", commands=commands)


def pretrain(cfg):
    tasks = f"{cfg.out}/data/tasks"
    flags = [f"--data={tasks}_train", f"--val_data={tasks}_val", f"--version={cfg.version}"]
    command = train(cfg, "pretrain", "pretrain", "pretrain_tasks", *flags, steps(cfg, 700, 500))
    return Stage(
        "pretrain",
        "pretraining (nats a byte)",
        "pretrained",
        after=("data",),
        commands=[command],
        metric="val_loss",
        threads=2,
        expect=choose(cfg, (0.91, 0.96), (0.92, 1.04)),
    )


def sft(cfg):
    flags = [*sft_data(cfg), f"--init_from={cfg.out}/pretrain/rwkv-final.pth"]
    command = train(cfg, "sft", "sft", "sft_tiny", *flags, steps(cfg, 200, 150))
    return Stage(
        "sft",
        "SFT on 500 chats",
        "SFT",
        after=("pretrain",),
        commands=[command],
        threads=2,
        expect=choose(cfg, (0.60, 0.90), (0.45, 0.8)),
    )


def state(cfg):
    flags = [f"--data={cfg.out}/data/tasks_unseen.jsonl", from_sft(cfg)]
    command = train(cfg, "state", "state", "state_tiny", *flags, steps(cfg, 300, 200))
    return Stage(
        "state",
        "state tuning, a command never seen",
        "a state",
        after=("sft",),
        commands=[command],
        expect=choose(cfg, (0.9, 1.0), (0.75, 1.0)),
    )


def more(cfg):
    flags = [*sft_data(cfg), from_sft(cfg), steps(cfg, 200, 150), "--lr=5e-4", "--lr_final=2e-5"]
    command = train(cfg, "sft", "more", "sft_tiny", *flags)
    return Stage(
        "more",
        "control: as much SFT again",
        "more SFT",
        after=("sft",),
        commands=[command],
        expect=choose(cfg, (0.60, 0.90), (0.45, 0.82)),
        is_control=True,
    )


def samples(cfg):
    answers = f"{cfg.out}/samples/answers.jsonl"
    sample = [
        "sample.py",
        "batch",
        f"{cfg.out}/data/tasks_prompts.jsonl",
        answers,
        f"--model={cfg.out}/sft/rwkv-final.pth",
        "--n=8",
        "--max_new_tokens=20",
        "--temperature=1.5",
        f"--seed={cfg.seed}",
        "--batch_size=512",
    ]
    pairs = ["tasks.py", "pairs", answers, f"--out={cfg.out}/samples/pairs"]
    what = f"8 answers to each of {choose(cfg, '6,400', '3,200')} prompts"
    return Stage("samples", what, "", after=("sft",), commands=[sample, pairs])


def grpo(cfg):
    flags = [f"--data={cfg.out}/data/tasks_prompts.jsonl", from_sft(cfg), steps(cfg, 700, 160)]
    faster = choose(cfg, [], ["--lr=3e-4", "--temperature=1.0", "--rollouts_every=0"])
    command = train(cfg, "grpo", "grpo", "grpo_tiny", *flags, *faster)
    return Stage(
        "grpo",
        "GRPO",
        "GRPO",
        after=("sft",),
        commands=[command],
        expect=choose(cfg, (0.78, 1.0), (0.57, 0.88)),
    )


def dpo(cfg):
    command = train(
        cfg, "dpo", "dpo", "dpo_tiny", *pairs_data(cfg), from_sft(cfg), steps(cfg, 200, 150)
    )
    return Stage(
        "dpo",
        "DPO + NLL",
        "DPO",
        after=("samples",),
        commands=[command],
        expect=choose(cfg, (0.72, 1.0), (0.58, 0.88)),
    )


def reward(cfg):
    flags = [*pairs_data(cfg), from_sft(cfg), steps(cfg, 300, 60)]
    command = train(cfg, "reward", "reward", "reward_tiny", *flags)
    return Stage(
        "reward",
        "reward model (accuracy on pairs)",
        "",
        after=("samples",),
        commands=[command],
        metric="val_accuracy",
        expect=choose(cfg, (0.92, 0.98), (0.82, 0.97)),
    )


def self_reward(cfg):
    command = [
        "self_reward.py",
        "config/self_reward_tiny.py",
        f"--prompts={cfg.out}/data/tasks_prompts.jsonl",
        from_sft(cfg),
        f"--seed={cfg.seed}",
        f"--out_dir={cfg.out}/self_reward",
        *choose(cfg, [], ["--recipe=quick"]),
    ]
    return Stage(
        "self_reward",
        f"self-rewarding, {choose(cfg, 'its own', 'the checker as')} judge",
        "self-rewarding",
        after=("sft",),
        commands=[command],
        expect=choose(cfg, (0.66, 0.95), (0.57, 0.88)),
    )


def ladder(cfg):
    """-> [Stage], in the order of the table"""
    if cfg.version == "x070":  # the longest one first, as soon as it can
        of_version = [grpo, more, state, samples, dpo, reward, self_reward]
    else:
        of_version = [state]
    stages = [stage(cfg) for stage in [data, pretrain, sft, *of_version]]
    for stage in stages:
        if cfg.version != "x070":
            stage.expect = ()  # not measured
    return stages


# ----------------------------------------------------------------------------------------------
# running them


def lineage(stage, stages):
    """Its commands, after those of all that it stands on."""
    before = [lineage(other, stages) for other in stages if other.name in stage.after]
    return sum(before, []) + stage.commands


def start(stage, cfg):
    """Run the stage's commands, one after the other, in a process with its output in a log.

    -> (process, when it began)
    """
    folder, log = ROOT / cfg.out / stage.name, log_of(stage, cfg)
    commands = [[sys.executable, *command] for command in stage.commands]
    if (folder / "last.pt").exists():
        commands = [command + ["--resume"] for command in commands]
    elif folder.exists() and stage.name != "self_reward":  # which goes on by itself
        shutil.rmtree(folder)  # cut off before its first checkpoint; nobody else writes here
    log.parent.mkdir(parents=True, exist_ok=True)
    line = " && ".join(subprocess.list2cmdline(command) for command in commands)
    # Threads that wait soon sleep.
    env = {"GOMP_SPINCOUNT": "1000", **os.environ, "OMP_NUM_THREADS": str(stage.threads)}
    with open(log, "w", encoding="utf-8") as out:
        process = subprocess.Popen(
            line,
            shell=True,
            cwd=ROOT,
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    return process, time.time()


def stop(running):
    for _, process, _ in running.values():
        os.killpg(process.pid, signal.SIGINT)  # a stage saves first
        process.wait()


def log_of(stage, cfg):
    return ROOT / cfg.out / f"{stage.name}.log"


def log_text(stage, cfg):
    return log_of(stage, cfg).read_text(encoding="utf-8", errors="replace")


def mark_of(stage, cfg):
    """The file that says of a finished stage how it was made."""
    return ROOT / cfg.out / f"{stage.name}.json"


def is_made(stage, stages, cfg):
    """Whether an earlier run made it, with the same commands; of other ones nothing is left."""
    mark = mark_of(stage, cfg)
    made = read_json(mark)
    if made.get("commands") == lineage(stage, stages):
        stage.seconds, stage.values = made["seconds"], tuple(made["rows"])
        return True
    if made:
        mark.unlink()
        shutil.rmtree(ROOT / cfg.out / stage.name, ignore_errors=True)
    return False


def measured(stage, cfg):
    """(metric before, after) from the stage's metrics.jsonl, or from what its rounds left; () if it
    trains nothing."""
    folder = ROOT / cfg.out / stage.name
    rows = whole_lines(folder / "metrics.jsonl")
    rows += [read_json(path) for path in sorted(folder.glob("*/done.json"))]
    rows = [row.get("eval", row) for row in rows]
    values = [row[stage.metric] for row in rows if stage.metric in row]
    return (values[0], values[-1]) if values else ()


def climb(cfg, running):
    """Run the ladder -> what went wrong, in words, or None.

    running: {name: (stage, process, when it began)}, kept up to date for who has to stop them.
    """
    stages, done, began = ladder(cfg), [], time.time()
    print_row(HEAD)
    while len(done) < len(stages):
        for stage in stages:
            done_names = {other.name for other in done}
            is_free = stage.name not in running and stage.name not in done_names
            if not is_free or not done_names.issuperset(stage.after) or len(running) == 2:
                continue
            if is_made(stage, stages, cfg):
                done.append(stage)
                print_row(cells(stage, cfg))
            else:
                running[stage.name] = (stage, *start(stage, cfg))
        for stage, process, stage_began in list(running.values()):
            if process.poll() is None:
                continue
            del running[stage.name]
            if process.returncode:
                stop(running)
                end = "\n".join(log_text(stage, cfg).split("\n")[-15:])
                return f"{stage.what}: failed; the end of {cfg.out}/{stage.name}.log:\n{end}"
            stage.seconds, stage.values = time.time() - stage_began, measured(stage, cfg)
            made = dict(commands=lineage(stage, stages), seconds=stage.seconds, rows=stage.values)
            write_json(mark_of(stage, cfg), made)
            done.append(stage)
            print_row(cells(stage, cfg))
        time.sleep(0.2)
    write_results(stages, cfg)
    title = f"gosling: the {cfg.mode} ladder, {cfg.version}, {duration(time.time() - began)}"
    report.write_report(
        stages, ROOT / cfg.out, title, {stage.name: log_text(stage, cfg) for stage in stages}
    )
    print(f"{duration(time.time() - began)}\n{how_to_go_on(cfg)}")
    wrong = [stage.what for stage in stages if not is_expected(stage)]
    return "outside of what was expected: " + "; ".join(wrong) if wrong else None


# ----------------------------------------------------------------------------------------------
# what is shown

HEAD = ("stage", "trained", "time", "before -> after", "expected")
WIDTHS = (38, 10, 8, 18, 16)


def is_expected(stage):
    if not stage.expect or not stage.values:
        return True
    return stage.expect[0] <= stage.values[-1] <= stage.expect[1]


def n_trained(stage, cfg):
    """How many numbers its optimiser trains, from its log."""
    groups = re.findall(r"tensors, ([\d,]+) parameters, lr", log_text(stage, cfg))
    return sum(int(n.replace(",", "")) for n in groups)


def cells(stage, cfg):
    """The stage's row: name, trained numbers, time, before -> after, expected."""
    n = n_trained(stage, cfg)
    values = dict.fromkeys(stage.values)  # one number where nothing was measured before
    expected = ""
    if stage.expect:
        expected = f"{stage.expect[0]:.2f} to {stage.expect[1]:.2f}"
    return [
        stage.what,
        f"{n:,}" if n else "",
        duration(stage.seconds),
        " -> ".join(f"{value:.3f}" for value in values),
        expected if is_expected(stage) else f"{expected} !",
    ]


def print_row(items):
    padded = [f"{item:<{width}}" for item, width in zip(items, WIDTHS, strict=True)]
    print("  ".join(padded).rstrip(), flush=True)


def write_results(stages, cfg):
    """results.jsonl: a line for each stage that trains, which runs/pictures.py draws."""
    rows = []
    for stage in stages:
        if not stage.values:
            continue
        # A reward model's head begins at zero: every pair is a tie, which says nothing.
        has_before = stage.metric == "exact_match"
        rows.append(
            {
                "stage": stage.name,
                "what": stage.what,
                "metric": stage.metric,
                "before": stage.values[0] if has_before else None,
                "after": stage.values[-1],
                "is_control": stage.is_control,
                "seconds": round(stage.seconds, 1),
                "seed": cfg.seed,
                "mode": cfg.mode,
                "version": cfg.version,
            }
        )
    write_jsonl(ROOT / cfg.out / "results.jsonl", rows)


def how_to_go_on(cfg):
    """What to try next, to be pasted."""
    best = "sft" if cfg.version == "x060" else "grpo"
    talk = "sample.py --chat --temperature=0 --model="
    return (
        f"look at it:  {cfg.out}/report.html\n"
        f"talk to it:  .venv/bin/python {talk}{cfg.out}/{best}/rwkv-final.pth\n"
        "             (a task such as: reverse abcd)\n"
        "go on:       source .venv/bin/activate; the README says with what"
    )


def main(cfg):
    running = {}
    try:
        problem = climb(cfg, running)
    except KeyboardInterrupt:
        stop(running)
        problem = "stopped; run it again to go on"
    if problem:
        sys.exit(problem)


if __name__ == "__main__":
    main(read_flags(Config))
