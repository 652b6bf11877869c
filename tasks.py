"""Small text skills with answers a program can check: what every method is tried on when there is only a laptop.

    python tasks.py --out=data/tasks
    python tasks.py pairs samples.jsonl --out=data/tasks_pairs      of sample.py batch: one right answer, one wrong one

A task is "reverse bdac", its answer "cadb"; as a chat, "User: reverse bdac\\n\\nAssistant:" -> " cadb". A tenth of all
tasks (crc32 % 10 == 0) is held out from all training, pretraining too. UNSEEN is in the pretraining text but in no
chat: left for state tuning to bring out. Writes, the same bytes for the same seed:

    <out>_text.jsonl      {"text"}: lines "task = answer", 30 % "check task = answer : ok|no", to pretrain on
    <out>_sft.jsonl       {"messages"}: tasks with their answers, few on purpose: later stages need room
    <out>_sft_val.jsonl   the same of held-out tasks, for a validation loss
    <out>_prompts.jsonl   {"prompt", "skill", "answer"}: new tasks, for stages that learn from the model's own answers
    <out>_heldout.jsonl   the same of held-out tasks, to measure on
    <out>_unseen.jsonl, <out>_unseen_heldout.jsonl    of the unseen skill: {"messages"} to train on, held-out tasks
"""

import json
import random
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import tyro

from common import UserError, atomic_write, read_flags

LETTERS = "abcdefghijkl"
UNSEEN = "rotate"
# skill: the answer from the task's other words. Skills in which a small model slips, so that every method has something
# to mend; "count a in abcab" is not among them: exact match .37 in the pretraining text, .36 after SFT, it was stuck.
RULES = {
    "reverse": lambda word: word[::-1],
    "sort": lambda word: "".join(sorted(word)),
    "upper": str.upper,
    "next": lambda word: "".join(chr(ord(c) + 1) for c in word),
    "double": lambda word: "".join(c + c for c in word),
    "replace": lambda old, _by, new, _in, word: word.replace(old, new),
    "remove": lambda old, _in, word: word.replace(old, ""),
    UNSEEN: lambda word: word[1:] + word[:1],
}
SKILLS = tuple(skill for skill in RULES if skill != UNSEEN)


@dataclass
class Config:
    out: str = "data/tasks"  # prefix of the files
    seed: int = 0  # another seed, other tasks; what is held out stays held out
    text_tokens: int = 2_700_000  # of pretraining text: bytes, and one end token a document
    sft: int = 500  # rows with an answer
    prompts: int = 6_400  # new tasks
    heldout: int = 1_000  # held-out tasks, and as many of the unseen skill
    unseen: int = 400  # rows of the unseen skill with an answer
    val: int = 200  # rows of held-out tasks with an answer, for a validation loss


def solve(task):
    """The answer, worked out from the task's text alone."""
    skill, *words = task.split(" ")
    try:
        return RULES[skill](*words)
    except (KeyError, TypeError):
        raise ValueError(f"{task!r} is not a task") from None


def check(task, text):
    """Is `text`, a completion, exactly the answer? White space around it does not count, anything else does."""
    return text.strip() == solve(task)


def is_held_out(task):
    return zlib.crc32(task.encode()) % 10 == 0


def make_task(skill, rng, held_out=False):
    """-> (task, answer), drawn with `rng`, a random.Random, until it is on the wanted side of the split."""
    while True:
        # where a letter is looked for, four are in use, so that it tends to be there more than once
        letters = rng.sample(LETTERS, 4) if skill in ("replace", "remove") else LETTERS
        word = "".join(
            rng.choices(letters, k=rng.randint(3, 6) if skill == "double" else rng.randint(4, 8))
        )
        old = rng.choice(word)
        if skill == "remove" and word[-1] == old:  # something must be left to answer
            word += rng.choice([c for c in letters if c != old])
        new = rng.choice([c for c in LETTERS if c != old])
        words = {"replace": [old, "by", new, "in", word], "remove": [old, "in", word]}.get(
            skill, [word]
        )
        task = " ".join([skill, *words])
        if is_held_out(task) == held_out:
            return task, solve(task)


def prompts(n, seed, skills=SKILLS, held_out=False):
    """n different tasks, the skills in turn -> rows for generation: {"prompt": messages, "skill", "answer"}."""
    rng, rows = random.Random(f"prompts {seed}"), {}
    while len(rows) < n:
        skill = skills[len(rows) % len(skills)]
        task, answer = make_task(skill, rng, held_out)
        rows[task] = {
            "prompt": [{"role": "user", "content": task}],
            "skill": skill,
            "answer": answer,
        }
    return list(rows.values())


def with_answer(row):
    """A row of `prompts` -> {"messages"}, a chat that ends in the answer, to train on."""
    return {"messages": row["prompt"] + [{"role": "assistant", "content": row["answer"]}]}


def corrupt(word, rng):
    """One slip of the pen: a letter changed, dropped, doubled, or swapped with its neighbour. Never the word itself."""
    while True:
        i, new = rng.randrange(len(word)), rng.choice(LETTERS)
        a, c, b = word[:i], word[i], word[i + 1 :]
        slip = rng.choice(
            [
                a + (new.upper() if c.isupper() else new) + b,
                a + b,
                a + c + c + b,
                a + b[:1] + c + b[1:],
            ]
        )
        if slip and slip != word:
            return slip


def document(rng):
    """1 to 8 lines of one skill or of several. The check lines teach comparing, which reward models and judges need."""
    one, lines = rng.random() < 0.5 and rng.choice(list(RULES)), []
    for _ in range(rng.randint(1, 8)):
        task, answer = make_task(one or rng.choice(list(RULES)), rng)
        verdict = rng.choice(["ok", "no"]) if rng.random() < 0.3 else None
        shown = corrupt(answer, rng) if verdict == "no" else answer
        lines.append(f"check {task} = {shown} : {verdict}" if verdict else f"{task} = {shown}")
    return "\n".join(lines)


def report(results):
    """results: [(row of `prompts`, completion text)] -> exact match per skill and the first ten, as a text."""
    rows = [(row["skill"], row["prompt"][-1]["content"], text.strip()) for row, text in results]
    lines = []
    for skill in [*dict.fromkeys(skill for skill, *_ in rows), "all"]:
        hits = [check(task, text) for own, task, text in rows if skill in (own, "all")]
        lines.append(f"{skill:8} {sum(hits) / max(len(hits), 1):6.3f} of {len(hits)}")
    for _, task, text in rows[:10]:
        lines.append(
            f"{task} -> {text!r}" + ("" if check(task, text) else f", should be {solve(task)!r}")
        )
    return "\n".join(lines)


@dataclass
class PairsConfig:
    samples: tyro.conf.Positional[
        str
    ]  # rows of `prompts` with "completions", as sample.py batch writes them
    out: str = "data/tasks_pairs"  # prefix of .jsonl and _val.jsonl
    val: float = 0.1  # share of the prompts that goes to _val.jsonl


def pairs(cfg):
    """Preferences for DPO and reward models: of each prompt's answers one that is right and one that is wrong."""
    if not Path(cfg.samples).is_file():
        raise UserError(
            f"{cfg.samples} does not exist; `python sample.py batch data/tasks_prompts.jsonl {cfg.samples} "
            "--model=...` writes it"
        )
    rng, rows = random.Random(0), []
    for line in open(cfg.samples):
        row = json.loads(line)
        texts = list(
            dict.fromkeys(c["text"] if isinstance(c, dict) else c for c in row["completions"])
        )
        right, wrong = (
            [t for t in texts if t.strip() and check(row["prompt"][-1]["content"], t) == want]
            for want in (True, False)
        )
        if right and wrong:
            rows.append(
                {
                    "prompt": row["prompt"],
                    "chosen": rng.choice(right),
                    "rejected": rng.choice(wrong),
                    "skill": row["skill"],
                }
            )
    cut = round(len(rows) * (1 - cfg.val))
    write(f"{cfg.out}.jsonl", rows[:cut], "pairs")
    write(f"{cfg.out}_val.jsonl", rows[cut:], "pairs")


def write(path, rows, what):
    with atomic_write(path) as tmp:
        tmp.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"{path}: {len(rows):,} {what}")


def main(cfg):
    rng, texts, size = random.Random(f"text {cfg.seed}"), [], 0
    while size < cfg.text_tokens:
        texts.append(document(rng))
        size += len(texts[-1]) + 1  # prepare.py puts an end token after every document
    files = {
        "text": [{"text": text} for text in texts],
        "sft": [with_answer(row) for row in prompts(cfg.sft, f"sft {cfg.seed}")],
        "sft_val": [
            with_answer(row) for row in prompts(cfg.val, f"sft val {cfg.seed}", held_out=True)
        ],
        "prompts": prompts(cfg.prompts, f"new {cfg.seed}"),
        "heldout": prompts(cfg.heldout, f"heldout {cfg.seed}", held_out=True),
        "unseen": [with_answer(row) for row in prompts(cfg.unseen, f"sft {cfg.seed}", [UNSEEN])],
        "unseen_heldout": prompts(cfg.heldout, f"heldout {cfg.seed}", [UNSEEN], held_out=True),
    }
    for name, rows in files.items():
        write(
            f"{cfg.out}_{name}.jsonl",
            rows,
            f"rows, {size:,} byte tokens" if name == "text" else "rows",
        )


if __name__ == "__main__":
    if sys.argv[1:2] == ["pairs"]:
        pairs(read_flags(PairsConfig, sys.argv[2:]))
    else:
        main(read_flags(Config))
