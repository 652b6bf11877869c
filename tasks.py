"""Small text skills with answers that a program can check: what every method is tried on when there
is only a laptop.

    python tasks.py --out=data/tasks
    python tasks.py pairs samples.jsonl --out=data/tasks_pairs
        of what sample.py batch wrote: for each prompt one right answer and one wrong one

A task is "reverse bdac", its answer "cadb"; as a chat, "User: reverse bdac\\n\\nAssistant:" ->
" cadb". A tenth of all tasks (crc32 % 10 == 0) is held out from all training, pretraining too.
UNSEEN, "shift", is a command that neither text nor chats have, for what the text calls "rotate": it
is left for state tuning. Writes, the same bytes for the same seed:

    <out>_text.jsonl      {"text"}: lines "task = answer", 30 % "check task = answer : ok|no", to
                          pretrain on
    <out>_sft.jsonl       {"messages"}: tasks with their answers, few on purpose: later stages need
                          room
    <out>_sft_val.jsonl   the same of held-out tasks, for a validation loss
    <out>_prompts.jsonl   {"prompt", "skill", "answer"}: new tasks, for stages that learn from the
                          model's own answers
    <out>_heldout.jsonl   the same of held-out tasks, to measure on
    <out>_unseen.jsonl    {"messages"}: tasks of the unseen command, to train on
    <out>_unseen_heldout.jsonl    held-out tasks of the unseen command, to measure on
"""

import random
import sys
import zlib
from dataclasses import dataclass

from gosling.config import Seed, Share, UserError, print0, read_flags
from gosling.data import read_jsonl, render_chat
from gosling.files import checked, write_jsonl
from gosling.schemas import Sampled

import tyro
from pydantic import NonNegativeInt

LETTERS = "abcdefghijkl"
# Skills in which a small model slips, so that every method has something to mend. "count a in
# abcab" is not among them: exact match .37 in the pretraining text, .36 after SFT, it was stuck.
SKILLS = ("reverse", "sort", "upper", "next", "double", "replace", "remove")
ALL_SKILLS = (*SKILLS, "rotate")  # of the pretraining text
UNSEEN = "shift"


@dataclass
class Config:
    out: str = "data/tasks"  # prefix of the files
    seed: Seed = 0  # another seed, other tasks; what is held out stays held out
    text_tokens: NonNegativeInt = 2_700_000  # of pretraining text: bytes, one end token a document
    sft: NonNegativeInt = 500  # rows with an answer
    prompts: NonNegativeInt = 6_400  # new tasks
    heldout: NonNegativeInt = 1_000  # held-out tasks, and as many of the unseen command
    unseen: NonNegativeInt = 400  # rows of the unseen command with an answer
    val: NonNegativeInt = 200  # rows of held-out tasks with an answer, for a validation loss


# ----------------------------------------------------------------------------------------------
# a task and its answer


def solve(task):
    """The answer, worked out from the task's text alone. ValueError for what is no task."""
    match task.split(" "):
        case ["reverse", word]:
            return word[::-1]
        case ["sort", word]:
            return "".join(sorted(word))
        case ["upper", word]:
            return word.upper()
        case ["next", word]:
            return "".join(chr(ord(letter) + 1) for letter in word)
        case ["double", word]:
            return "".join(letter * 2 for letter in word)
        case ["replace", old, "by", new, "in", word]:
            return word.replace(old, new)
        case ["remove", old, "in", word]:
            return word.replace(old, "")
        case ["rotate" | "shift", word]:
            return word[1:] + word[:1]
    raise ValueError(f"{task!r:.60} is not a task")


def check(task, text):
    """Is `text`, a completion, exactly the answer? White space around it does not count."""
    return text.strip() == solve(task)


def is_held_out(task):
    return zlib.crc32(task.encode()) % 10 == 0


def make_task(skill, rng, held_out=False):
    """-> (task, answer), drawn with `rng`, a random.Random, on the wanted side of the split."""
    while True:
        letters = LETTERS
        if skill in ("replace", "remove"):  # of four letters, so that one tends to come twice
            letters = rng.sample(LETTERS, 4)
        length = rng.randint(3, 6) if skill == "double" else rng.randint(4, 8)
        word = "".join(rng.choices(letters, k=length))
        old = rng.choice(word)
        if skill == "remove" and word[-1] == old:  # something must be left to answer
            word += rng.choice([letter for letter in letters if letter != old])
        new = rng.choice([letter for letter in LETTERS if letter != old])
        task = f"{skill} {word}"
        if skill == "replace":
            task = f"replace {old} by {new} in {word}"
        elif skill == "remove":
            task = f"remove {old} in {word}"
        if is_held_out(task) == held_out:
            return task, solve(task)


# ----------------------------------------------------------------------------------------------
# rows


def prompts(n, seed, skills=SKILLS, held_out=False):
    """n different tasks, the skills in turn -> rows {"prompt": messages, "skill", "answer"}."""
    rng, rows = random.Random(f"prompts {seed}"), {}
    while len(rows) < n:
        skill = skills[len(rows) % len(skills)]
        task, answer = make_task(skill, rng, held_out)
        messages = [{"role": "user", "content": task}]
        rows[task] = {"prompt": messages, "skill": skill, "answer": answer}
    return list(rows.values())


def with_answer(row):
    """A row of `prompts` -> {"messages"}, a chat that ends in the answer, to train on."""
    return {"messages": row["prompt"] + [{"role": "assistant", "content": row["answer"]}]}


def corrupt(word, rng):
    """One slip of the pen: a letter changed, dropped, doubled, or swapped with its neighbour."""
    while True:
        i, new = rng.randrange(len(word)), rng.choice(LETTERS)
        before, letter, after = word[:i], word[i], word[i + 1 :]
        changed = before + (new.upper() if letter.isupper() else new) + after
        swapped = before + after[:1] + letter + after[1:]
        slip = rng.choice([changed, before + after, before + letter * 2 + after, swapped])
        if slip and slip != word:
            return slip


def document(rng):
    """1 to 8 lines of one skill or of several. The check lines teach comparing, which reward models
    and judges need."""
    one_skill = rng.random() < 0.5 and rng.choice(ALL_SKILLS)
    lines = []
    for _ in range(rng.randint(1, 8)):
        task, answer = make_task(one_skill or rng.choice(ALL_SKILLS), rng)
        if rng.random() >= 0.3:
            lines.append(f"{task} = {answer}")
        elif rng.choice(["ok", "no"]) == "ok":
            lines.append(f"check {task} = {answer} : ok")
        else:
            lines.append(f"check {task} = {corrupt(answer, rng)} : no")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------
# measuring


def exact_match(model, tokenizer, skills=SKILLS, rows=1000):
    """Greedy answers to held-out tasks, reported -> {"exact_match": share}: an eval_fn."""
    from gosling.engine import generate  # not above: files are written without the network

    asked = prompts(rows, "heldout 0", skills, held_out=True)
    prompt_ids = [render_chat(r["prompt"], tokenizer, generation_prompt=True)[0] for r in asked]
    answers = generate(
        model, prompt_ids, max_new_tokens=20, temperature=0, tokenizer=tokenizer, batch_size=250
    )
    results = [(row, answer.text) for row, answer in zip(asked, answers, strict=True)]
    print0(report(results))
    return {"exact_match": sum(is_right(*result) for result in results) / rows}


def is_right(row, text):
    """Is `text` the answer to a row of `prompts`?"""
    return check(row["prompt"][-1]["content"], text)


def report(results):
    """[(row of `prompts`, completion's text)] -> exact match per skill and the first ten, a text"""
    lines = []
    for skill in [*dict.fromkeys(row["skill"] for row, _ in results), "all"]:
        hits = [is_right(*result) for result in results if skill in (result[0]["skill"], "all")]
        lines.append(f"{skill:8} {sum(hits) / max(len(hits), 1):6.3f} of {len(hits)}")
    for row, text in results[:10]:
        task = row["prompt"][-1]["content"]
        correction = "" if check(task, text) else f", should be {solve(task)!r}"
        lines.append(f"{task} -> {text.strip()!r}{correction}")
    return "\n".join(lines)


# ----------------------------------------------------------------------------------------------
# the commands


@dataclass
class PairsConfig:
    samples: tyro.conf.Positional[str]  # rows of `prompts` with "completions", of sample.py batch
    out: str = "data/tasks_pairs"  # prefix of .jsonl and _val.jsonl
    val: Share = 0.1  # share of the prompts that goes to _val.jsonl


def answers_of(row):
    """A row of `sample.py batch` -> (the row, its different answers); UserError if it is none."""
    checked(row, Sampled, "the row")
    try:
        solve(row["prompt"][-1]["content"])
    except ValueError as e:
        raise UserError(str(e)) from None
    texts = [c["text"] if isinstance(c, dict) else c for c in row["completions"]]
    return row, list(dict.fromkeys(texts))


def pairs(cfg):
    """Preferences for DPO and reward models: of each prompt's answers a right and a wrong one."""
    rng, rows = random.Random(0), []
    shape = '{"prompt", "skill", "completions"}, as `python sample.py batch` writes it'
    for _, (row, texts) in read_jsonl(cfg.samples, shape, answers_of):
        right = [text for text in texts if is_right(row, text)]
        wrong = [text for text in texts if text.strip() and not is_right(row, text)]
        if right and wrong:
            pair = {"prompt": row["prompt"], "chosen": rng.choice(right)}
            rows.append({**pair, "rejected": rng.choice(wrong), "skill": row["skill"]})
    n_train = round(len(rows) * (1 - cfg.val))
    write(f"{cfg.out}.jsonl", rows[:n_train], "pairs")
    write(f"{cfg.out}_val.jsonl", rows[n_train:], "pairs")


def write(path, rows, what):
    write_jsonl(path, rows)
    print(f"{path}: {len(rows):,} {what}")


def main(cfg):
    rng, texts, n_tokens = random.Random(f"text {cfg.seed}"), [], 0
    while n_tokens < cfg.text_tokens:
        texts.append(document(rng))
        n_tokens += len(texts[-1]) + 1  # prepare.py puts an end token after every document
    sft = prompts(cfg.sft, f"sft {cfg.seed}")
    sft_val = prompts(cfg.val, f"sft val {cfg.seed}", held_out=True)
    unseen = prompts(cfg.unseen, f"sft {cfg.seed}", [UNSEEN])
    heldout_seed = f"heldout {cfg.seed}"
    files = {
        "text": [{"text": text} for text in texts],
        "sft": [with_answer(row) for row in sft],
        "sft_val": [with_answer(row) for row in sft_val],
        "prompts": prompts(cfg.prompts, f"new {cfg.seed}"),
        "heldout": prompts(cfg.heldout, heldout_seed, held_out=True),
        "unseen": [with_answer(row) for row in unseen],
        "unseen_heldout": prompts(cfg.heldout, heldout_seed, [UNSEEN], held_out=True),
    }
    for name, rows in files.items():
        what = f"rows, {n_tokens:,} byte tokens" if name == "text" else "rows"
        write(f"{cfg.out}_{name}.jsonl", rows, what)


if __name__ == "__main__":
    if sys.argv[1:2] == ["pairs"]:
        pairs(read_flags(PairsConfig, sys.argv[2:]))
    else:
        main(read_flags(Config))
