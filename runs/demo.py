"""Every method on one small family of tasks, each from the one before: what runs/demo.sh runs.

Two stages at a time, one thread each, as far as they do not wait for each other; a row of the table as each ends; at the
end out/demo/report.html. A stage that is there is not run again; one that was cut off goes on, or begins anew.
"""

import base64
import html
import json
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
from common import atomic_write, duration, read_flags  # noqa: E402


@dataclass
class Config:
    mode: tyro.conf.Positional[Literal["full", "quick"]] = (
        "full"  # quick: fewer steps, the same stages, no numbers to expect
    )
    version: Literal["x070", "x060"] = (
        "x070"  # x060: pretraining, SFT and state tuning of an RWKV-6
    )
    seed: int = 42  # of every stage
    out: str = "out/demo"  # a folder for each stage, and the report


@dataclass
class Stage:
    name: str
    what: str  # its row in the table
    after: tuple = ()  # names of stages that it needs
    commands: list = field(default_factory=list)
    metric: str = "exact_match"  # of metrics.jsonl: first and last
    threads: int = 1  # 2 where no other stage can run beside it
    expect: tuple | None = (
        None  # where the last one was, of all seeds that were tried, and a little beside
    )
    seconds: float = 0.0
    rows: tuple = ()  # before, after


def ladder(cfg):
    out, data, quick, v7 = cfg.out, f"{cfg.out}/data", cfg.mode == "quick", cfg.version == "x070"
    steps = lambda full, fewer: f"--max_steps={fewer if quick else full}"  # noqa: E731
    train = lambda script, stage, config, *flags: [
        f"train_{script}.py",
        f"config/{config}.py",
        f"--out_dir={out}/{stage}",
        f"--seed={cfg.seed}",
        *flags,
    ]  # noqa: E731
    sft = f"--init_from={out}/sft/rwkv-final.pth"
    pairs = f"--data={out}/samples/pairs.jsonl", f"--val_data={out}/samples/pairs_val.jsonl"
    stages = [
        Stage(
            "data",
            "tasks, text to pretrain on",
            commands=[
                ["tasks.py", f"--out={data}/tasks", *["--prompts=1600"] * quick],
                [
                    "prepare.py",
                    f"{data}/tasks_text.jsonl",
                    f"--out={data}/tasks",
                    "--tokenizer=bytes",
                    "--val=0.01",
                ],
                ["tasks.py", "--seed=1", "--out=data/tasks1"],
            ],
        ),
        Stage(
            "pretrain",
            "pretraining (nats a byte)",
            ("data",),
            [
                train(
                    "pretrain",
                    "pretrain",
                    "pretrain_tasks",
                    f"--data={data}/tasks_train",
                    f"--val_data={data}/tasks_val",
                    f"--version={cfg.version}",
                    steps(700, 300),
                )
            ],
            "val_loss",
            2,
            (0.91, 0.96) if v7 else None,
        ),
        Stage(
            "sft",
            "SFT on 500 chats",
            ("pretrain",),
            [
                train(
                    "sft",
                    "sft",
                    "sft_tiny",
                    f"--data={data}/tasks_sft.jsonl",
                    f"--val_data={data}/tasks_sft_val.jsonl",
                    f"--init_from={out}/pretrain/rwkv-final.pth",
                    steps(200, 100),
                )
            ],
            threads=2,
            expect=(0.60, 0.90) if v7 else None,
        ),
        Stage(
            "state",
            "state tuning, a skill SFT never saw",
            ("sft",),
            [
                train(
                    "state",
                    "state",
                    "state_tiny",
                    f"--data={data}/tasks_unseen.jsonl",
                    sft,
                    steps(300, 150),
                )
            ],
            expect=(0.94, 1.0) if v7 else None,
        ),
    ]
    if v7:
        stages += [
            Stage(
                "more",
                "control: as much SFT again",
                ("sft",),
                [
                    train(
                        "sft",
                        "more",
                        "sft_tiny",
                        f"--data={data}/tasks_sft.jsonl",
                        f"--val_data={data}/tasks_sft_val.jsonl",
                        sft,
                        steps(200, 50),
                        "--lr=5e-4",
                        "--lr_final=2e-5",
                    )
                ],
                expect=(0.60, 0.90),
            ),
            Stage(
                "samples",
                "8 answers to each of 6,400 prompts",
                ("sft",),
                [
                    [
                        "sample.py",
                        "batch",
                        f"{data}/tasks_prompts.jsonl",
                        f"{out}/samples/answers.jsonl",
                        f"--model={out}/sft/rwkv-final.pth",
                        "--n=8",
                        "--max_new_tokens=20",
                        "--temperature=1.5",
                        f"--seed={cfg.seed}",
                        "--batch_size=512",
                    ],
                    [
                        "tasks.py",
                        "pairs",
                        f"{out}/samples/answers.jsonl",
                        f"--out={out}/samples/pairs",
                    ],
                ],
            ),
            Stage(
                "grpo",
                "GRPO",
                ("sft",),
                [
                    train(
                        "grpo",
                        "grpo",
                        "grpo_tiny",
                        f"--data={data}/tasks_prompts.jsonl",
                        sft,
                        steps(700, 100),
                        *["--lr=3e-4"] * quick,
                    )
                ],
                expect=(0.78, 1.0),
            ),
            Stage(
                "dpo",
                "DPO + NLL",
                ("samples",),
                [train("dpo", "dpo", "dpo_tiny", *pairs, sft, steps(200, 50))],
                expect=(0.72, 1.0),
            ),
            Stage(
                "reward",
                "reward model (accuracy on pairs)",
                ("samples",),
                [train("reward", "reward", "reward_tiny", *pairs, sft, steps(300, 50))],
                "val_accuracy",
                expect=(0.92, 0.98),
            ),
            Stage(
                "self_reward",
                "self-rewarding, its own judge",
                ("sft",),
                [
                    [
                        "self_reward.py",
                        "config/self_reward_tiny.py",
                        f"--prompts={data}/tasks_prompts.jsonl",
                        sft,
                        f"--seed={cfg.seed}",
                        f"--out_dir={out}/self_reward",
                        *["--recipe=quick"] * quick,
                    ]
                ],
                expect=(0.66, 0.95),
            ),
        ]
    return stages


def lineage(stage, stages):
    """its commands, after those of all that it stands on"""
    return [c for s in stages if s.name in stage.after for c in lineage(s, stages)] + stage.commands


def start(stage, cfg):
    """Run the stage's commands one after the other in a process of its own, its output in <out>/<name>.log."""
    folder, log = ROOT / cfg.out / stage.name, ROOT / cfg.out / f"{stage.name}.log"
    commands = [[sys.executable, *command] for command in stage.commands]
    if (folder / "last.pt").exists():
        commands = [command + ["--resume"] for command in commands]
    elif folder.exists() and stage.name != "self_reward":  # which goes on by itself
        shutil.rmtree(folder)  # cut off before its first checkpoint; nobody else writes here
    log.parent.mkdir(parents=True, exist_ok=True)
    line = " && ".join(subprocess.list2cmdline(command) for command in commands)
    env = {
        "GOMP_SPINCOUNT": "1000",
        **os.environ,
        "OMP_NUM_THREADS": str(stage.threads),
    }  # threads that wait soon sleep
    return subprocess.Popen(
        line,
        shell=True,
        cwd=ROOT,
        env=env,
        stdout=open(log, "w"),
        stderr=subprocess.STDOUT,
        start_new_session=True,
    ), time.time()


def result(stage, cfg):
    """(metric before, after) from the stage's metrics.jsonl, or what its rounds left; () if it trains nothing"""
    folder = ROOT / cfg.out / stage.name
    lines = (folder / "metrics.jsonl").open() if (folder / "metrics.jsonl").exists() else ()
    rows = map(json.loads, [*lines, *(f.read_text() for f in sorted(folder.glob("*/done.json")))])
    values = [
        row[stage.metric] for row in (row.get("eval", row) for row in rows) if stage.metric in row
    ]
    return (values[0], values[-1]) if values else ()


def trained(stage, cfg):
    """how many numbers its optimiser trains, from its log"""
    groups = re.findall(
        r"tensors?, ([\d,]+) \(lr", (ROOT / cfg.out / f"{stage.name}.log").read_text()
    )
    return sum(int(n.replace(",", "")) for n in groups)


def cells(stage, cfg):
    """the stage's row: name, trained numbers, time, before -> after, expected"""
    n, quick = trained(stage, cfg), cfg.mode == "quick"
    score = " -> ".join(
        f"{x:.3f}" for x in dict.fromkeys(stage.rows)
    )  # one number where nothing was measured before
    wanted = f"{stage.expect[0]:.2f} to {stage.expect[1]:.2f}" if stage.expect and not quick else ""
    return [
        stage.what,
        f"{n:,}" if n else "",
        duration(stage.seconds),
        score,
        wanted + " !" * (not within(stage, cfg)),
    ]


def within(stage, cfg):
    return (
        not (cfg.mode != "quick" and stage.expect and stage.rows)
        or stage.expect[0] <= stage.rows[1] <= stage.expect[1]
    )


STYLE = """body { font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid #ccc }
pre { background: #f4f4f4; padding: 1rem; white-space: pre-wrap; font-size: 13px } img { max-width: 100% }"""


def report(stages, cfg, seconds):
    """one file: the table, then of each stage its command, its curves and the end of its log, where the samples are"""
    cell = lambda tag, items: (
        "<tr>" + "".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in items) + "</tr>"
    )  # noqa: E731
    parts = [
        f"<!doctype html><meta charset=utf-8><title>gosling: the ladder</title><style>{STYLE}</style>",
        f"<h1>gosling: the ladder, {html.escape(cfg.version)}, {cfg.mode}, {duration(seconds)}</h1><table>",
        cell("th", HEAD),
        *(cell("td", cells(s, cfg)) for s in stages),
        "</table>",
        "<p>Exact match of greedy answers to 1,000 tasks that no stage has seen, unless said.</p>",
    ]
    for s in stages:
        log = ROOT / cfg.out / f"{s.name}.log"
        parts.append(f"<h2>{html.escape(s.what)}</h2>")
        parts += [
            f"<pre>python {html.escape(subprocess.list2cmdline(c))}</pre>" for c in s.commands
        ]
        parts += [
            f"<img src='data:image/png;base64,{base64.b64encode(picture.read_bytes()).decode()}'>"
            for picture in (ROOT / cfg.out / s.name).glob("*.png")
        ]
        lines = [
            x
            for x in re.sub(r"\x1b\[\d+m", "", log.read_text()).split("\n")
            if not x.startswith("step ")
        ]  # the curves
        parts.append(f"<p>samples, scores</p><pre>{html.escape(chr(10).join(lines[-45:]))}</pre>")
    with atomic_write(ROOT / cfg.out / "report.html") as tmp:
        tmp.write_text("\n".join(parts))


def stop(running):
    for _, process, _ in running.values():
        os.killpg(process.pid, signal.SIGINT)  # a stage saves first
        process.wait()


HEAD = ("stage", "trained", "time", "before -> after", "expected")
WIDTHS = (38, 10, 8, 18, 16)


def main(cfg):
    running = {}
    try:
        climb(cfg, running)
    except KeyboardInterrupt:
        stop(running)
        sys.exit("stopped; run it again to go on")


def climb(cfg, running):
    stages, done, t0 = ladder(cfg), [], time.time()
    show = lambda items: print(
        "  ".join(f"{x:<{w}}" for x, w in zip(items, WIDTHS)).rstrip(), flush=True
    )  # noqa: E731
    show(HEAD)
    while len(done) < len(stages):
        for stage in stages:
            mark = ROOT / cfg.out / f"{stage.name}.json"
            if (
                stage in done
                or stage.name in running
                or not set(stage.after) <= {s.name for s in done}
                or len(running) == 2
            ):
                continue
            said = json.loads(mark.read_text()) if mark.exists() else {}
            if said.get("commands") == lineage(stage, stages):  # of an earlier run
                stage.seconds, stage.rows = said["seconds"], tuple(said["rows"])
                done.append(stage)
                show(cells(stage, cfg))
            else:
                if said:  # it was made in another way
                    mark.unlink()
                    shutil.rmtree(ROOT / cfg.out / stage.name, ignore_errors=True)
                running[stage.name] = (stage, *start(stage, cfg))
        for name, (stage, process, began) in list(running.items()):
            if process.poll() is None:
                continue
            del running[name]
            if process.returncode:
                stop(running)
                sys.exit(
                    f"{stage.what}: failed; the end of {cfg.out}/{name}.log:\n"
                    + "\n".join((ROOT / cfg.out / f"{name}.log").read_text().split("\n")[-15:])
                )
            stage.seconds, stage.rows = time.time() - began, result(stage, cfg)
            with atomic_write(ROOT / cfg.out / f"{name}.json") as tmp:
                tmp.write_text(
                    json.dumps(
                        dict(
                            commands=lineage(stage, stages), seconds=stage.seconds, rows=stage.rows
                        )
                    )
                )
            done.append(stage)
            show(cells(stage, cfg))
        time.sleep(0.2)
    report(stages, cfg, time.time() - t0)
    print(f"{duration(time.time() - t0)}; {cfg.out}/report.html")
    if wrong := [stage.what for stage in stages if not within(stage, cfg)]:
        sys.exit("outside of what was expected: " + "; ".join(wrong))


if __name__ == "__main__":
    main(read_flags(Config))
