"""out/demo/report.html: what runs/demo.py did, on one page that needs nothing else.

On top the ladder as a picture; then what each stage's model answers to ten tasks that none of them
has seen; then for each stage its curve, a few plain words, its commands, and its log folded away.
"""

import html
import re
import subprocess

import tasks
from gosling import engine
from gosling.data import render_chat
from gosling.files import atomic_write, whole_lines
from gosling.metrics import duration
from runs import pictures

import torch

WORDS = {
    "data": """Small text skills whose answers a program can check: reverse, sort, upper, next,
        double, replace, remove, rotate. A tenth of all tasks is held out from everything that
        follows; all numbers on this page are measured on those.""",
    "pretrain": """A network with random weights reads lines such as “reverse bdac = cadb” and
        learns to predict the next byte. It learns the skills on the way, but it cannot chat: asked
        “User: reverse bdac”, it goes on with whatever such a text might go on with. The loss is
        what it still does not know, in nats a byte; some of the text is random, so it stays above
        zero.""",
    "sft": """Supervised fine-tuning: 500 chats with right answers. The loss is on the answers
        alone. The model learns little that is new; it learns that a chat is a place to use what it
        knows. That is why a few seconds take it from nothing to half of the tasks.""",
    "state": """The weights stay as they are. What is learned is the state that the recurrence
        starts from: 16,384 numbers that stand for a prompt no one has to type. Here they teach it
        a command, shift, that it has never seen, for what the pretraining text calls rotate. The
        file is a few kilobytes and can be put beside the model or left away.""",
    "more": """A control: what do the same steps of plain SFT on the same chats give? A method below
        that starts from the same model should be read beside this bar.""",
    "samples": """The SFT model answers each prompt eight times, and the checker says which answers
        are right. One right and one wrong answer to the same prompt make a pair, which the next
        two stages learn from. No new labels are written by hand.""",
    "dpo": """Direct preference optimisation: the right answer of each pair is made likelier and the
        wrong one less likely, compared with the SFT model. A term for the right answer itself (NLL)
        holds it in place: without it both become unlikely, and the model gets worse.""",
    "reward": """A network that reads a task and an answer and gives one number: how good it is. It
        is trained on the pairs to rate the right answer higher. The bar is the share of pairs it
        has not seen in which it does; guessing gives one half.""",
    "grpo": """Reinforcement learning. The model answers each prompt eight times, the checker gives
        1 or 0, and an answer is made likelier by how much it beats the others of its group. The
        curve is the share of right answers among those that it tries, which is lower than that of
        its best guesses.""",
    "self_reward": """A round of self-rewarding: the model answers, a judge scores the answers, the
        best and the worst become a pair, DPO learns from it. In the quick run the judge is the
        checker; in the full one it is the model itself, trained to judge.""",
}
ANSWERING = ("pretrain", "sft", "state", "more", "dpo", "grpo", "self_reward")

STYLE = """\
:root { color-scheme: light dark; --line: #8884; --soft: #8882; --good: #2f8f6f; --bad: #c0563e }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem }
h2 { margin-top: 2.5rem }
table { border-collapse: collapse; font-size: 15px }
td, th { text-align: left; padding: .3rem .6rem; border-bottom: 1px solid var(--line) }
pre { background: var(--soft); padding: .7rem 1rem; border-radius: 6px; white-space: pre-wrap;
      overflow-wrap: anywhere; font-size: 13px }
pre.command { user-select: all; cursor: copy }
svg { max-width: 100%; height: auto }
.wide { overflow-x: auto } .mono { font-family: monospace; white-space: nowrap }
.good { color: var(--good) } .bad { color: var(--bad) }
p, pre { max-width: 46rem }
summary { cursor: pointer }"""


def model_of(name, folder):
    """The file of what a stage made: weights, or a state beside the model it was tuned on."""
    found = sorted((folder / name).glob("**/rwkv-final.pth"))
    found += sorted((folder / name).glob("state-final.pth"))
    return found[-1] if found else None


def held_out_tasks():
    """Ten of the tasks that the stages are measured on: one of each skill, three of the unseen."""
    rows = tasks.prompts(len(tasks.SKILLS), "heldout 0", held_out=True)
    return rows + tasks.prompts(10 - len(rows), "heldout 0", [tasks.UNSEEN], held_out=True)


@torch.no_grad()
def answers(names, folder, rows):
    """What the stages' models answer, greedily -> {stage: [text of each row]}"""
    found = {}
    for name in names:
        path = model_of(name, folder)
        if path is None:
            continue
        model, tokenizer, _ = engine.load(path, torch.device("cpu"), torch.float32)
        prompts = [render_chat(r["prompt"], tokenizer, generation_prompt=True)[0] for r in rows]
        completions = engine.generate(
            model, prompts, max_new_tokens=20, temperature=0, tokenizer=tokenizer, progress=False
        )
        found[name] = [completion.text.strip() for completion in completions]
    return found


def answers_table(stages, folder):
    """A table: a task a row, a stage a column; right answers green, wrong ones red."""
    rows = held_out_tasks()
    found = answers([s.name for s in stages if s.name in ANSWERING], folder, rows)
    short = {stage.name: stage.short for stage in stages}
    head = "".join(f"<th>{html.escape(text)}</th>" for text in ["task", *map(short.get, found)])
    lines = [f"<tr>{head}</tr>"]
    for i, row in enumerate(rows):
        cells = f"<td class=mono>{html.escape(row['prompt'][-1]['content'])}</td>"
        for texts in found.values():
            kind, text = "bad", html.escape(texts[i][:12]) or "nothing"
            if tasks.is_right(row, texts[i]):
                kind = "good"
            mark = {"good": "✓", "bad": "✗"}[kind]
            cells += f"<td class='mono {kind}'>{mark} {text}</td>"
        lines.append(f"<tr>{cells}</tr>")
    return "<div class=wide><table>" + "\n".join(lines) + "</table></div>"


def curve(stage, folder):
    """The stage's curve as SVG, or nothing."""
    if stage.name not in pictures.CURVES:
        return ""
    rows = pictures.metrics_of(folder / stage.name)
    return pictures.curve_svg(rows, stage.name) or ""


def section(stage, folder, log):
    """A stage: what it gained, its curve, plain words, its commands, its log folded away."""
    change = " → ".join(f"{value:.3f}" for value in dict.fromkeys(stage.values))
    parts = [
        f"<h2>{html.escape(stage.what)}</h2>",
        f"<p>{', '.join(filter(None, [change, duration(stage.seconds)]))}</p>",
        f"<p>{' '.join(html.escape(WORDS[stage.name]).split())}</p>",
        curve(stage, folder),
    ]
    for command in stage.commands:
        line = html.escape(subprocess.list2cmdline(command))
        parts.append(f"<pre class=command>python {line}</pre>")
    log = html.escape(re.sub(r"\x1b\[\d+m", "", log))
    return [*parts, f"<details><summary>log</summary><pre>{log}</pre></details>"]


def write_report(stages, folder, title, logs):
    """report.html in the ladder's folder.

    stages: finished Stages of runs/demo.py. logs: {stage: text}.
    """
    results = whole_lines(folder / "results.jsonl")
    parts = [
        "<!doctype html><html lang=en><meta charset=utf-8>"
        "<meta name=viewport content='width=device-width, initial-scale=1'>"
        f"<title>gosling: the ladder</title><style>{STYLE}</style>",
        f"<h1>{html.escape(title)}</h1>",
        pictures.ladder_svg(results),
        "<p>The share of right greedy answers to 1,000 tasks that no stage has seen; of the reward "
        "model, the share of pairs that it has not seen and puts in the right order.</p>",
        "<h2>Ten tasks</h2>",
        "<p>What each stage's model answers. The last three have the command that only "
        "state tuning was shown.</p>",
        answers_table(stages, folder),
    ]
    for stage in stages:
        parts += section(stage, folder, logs[stage.name])
    with atomic_write(folder / "report.html") as tmp:
        tmp.write_text("\n".join(parts), encoding="utf-8")
