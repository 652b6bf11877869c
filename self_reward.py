"""Self-rewarding language models: answer, judge, pair, DPO, round after round, with every stage's data on disk.

    candidates.jsonl   N answers to each prompt by the current model, a line each
    scores.jsonl       what the judge thinks of each, a line each
    pairs.jsonl        best against worst; ties, equal texts and prompts with too few scores are dropped, and counted
    rwkv-final.pth     DPO on the pairs against the round's own starting point, by train_dpo.py

`stages` is a list of these, in any order. Settings are those of Config and of the script that trains, side by side:

    sft(data=), dpo(data=)       train_sft.py, train_dpo.py
    self_reward(prompts=)        a round; the judge is the current model, or judge_model: weights, a LoRA or a state
    external_reward(reward=)     a round with a function (prompts, completions, **columns) -> numbers, as in train_grpo.py
    spin(data=)                  chosen: the data's answer, rejected: the model's own; beta is the paper's lambda
    train_judge(prompts=)        own answers, labelled by `check` -> a LoRA (tune="state": a state) that judges from here on
    new_prompts(seeds=)          prompts by the model, after 8 shown ones, without near duplicates, for what follows

Each has a folder out_dir/NN-name. A complete one is skipped at a restart, one that was cut off goes on at its line or its
checkpoint (save_every). The judge of an RNN: what the template says before its first field is read once, and every answer
goes on from a copy of that state. judge="sample" parses what it writes; "expected" is the mean of the score texts' values
under their probabilities, one pass and nothing to parse; "head" reads a scalar head (train_reward.py). Papers: Yuan et al.,
arXiv 2401.10020; SPIN, 2401.01335.

Usual mistakes: measuring a judge on another model's answers; no control (as much more SFT); length that grows with the
score (report.md shows it); plain DPO on a small model (nll_coef).

    python self_reward.py config/self_reward_tiny.py                                         a laptop: 0.747 -> 0.769 -> 0.772
    python self_reward.py config/self_reward_tiny.py --recipe=external_reward                exact match 0.751 -> 0.862 -> 0.903
    torchrun --nproc_per_node=8 self_reward.py config/self_reward_1b5.py                     eight GPUs
    python self_reward.py make-eft config/self_reward_tiny.py --samples=s.jsonl --out=eft    judge rows of labelled answers
"""

import contextlib
import dataclasses
import difflib
import functools
import itertools
import json
import os
import random
import re
import statistics
import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Literal

import torch
import tyro
from tqdm import tqdm

import common
import prepare
import sample
import train_dpo
import train_grpo
import train_reward
import train_sft
import train_state
from common import UserError, load_config, print0
from model import base_of, evaluate, load_model


@dataclass
class Config:
    # stages
    stages: tyro.conf.Fixed[list | dict] = field(
        default_factory=list
    )  # a list as above, or {name: such a list}
    recipe: str = ""  # which of several lists; empty = the first
    init_from: str = ""  # weights to start from (.pth, .safetensors)
    out_dir: str = "out/self_reward"  # a folder for each stage, report.md and report.png
    fresh: bool = False  # start over: what this wrote in out_dir is deleted, nothing else
    seed: int = 42  # of candidates, judgements and training
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = (
        "auto"  # of the computation; auto = bfloat16 on CUDA, else float32
    )
    tokenizer: str = (
        ""  # name or file; empty = what the model's folder says, or World if it has 65536 ids
    )
    # candidates
    prompts: str = (
        ""  # JSONL of {"prompt": text or messages, columns for a reward …}, no prompt twice
    )
    first_prompt: int = 0  # where in that file a round begins
    max_prompts: int | None = None  # at most so many of them; none = all that follow
    num_candidates: int = 4  # answers to each prompt
    max_completion_length: int = 512  # tokens of an answer
    temperature: float = 0.7  # of answers
    top_p: float = 0.9  # of answers and judgements
    stop: tuple[str, ...] = (
        "\n\nUser:",
    )  # texts that end an answer, besides the tokenizer's end id
    block: int = 32  # prompts that are sampled, judged and written together
    # judge
    judge: Literal["sample", "expected", "head"] = "sample"  # as above
    judge_model: str = ""  # weights, a LoRA or a state; empty = the current model
    judge_template: str = (
        ""  # with {prompt} and {response}, or jinja2; the paper's: config/self_reward_1b5.py
    )
    judge_samples: int = 3  # judgements of an answer, averaged over those with a score (sample)
    judge_temperature: float = 0.7  # of judgements
    judge_max_tokens: int = 200  # of a judgement
    judge_cue: str = " Score:"  # follows the template where the score is read at once (expected)
    judge_choices: tyro.conf.Fixed[dict] = field(
        default_factory=lambda: {f" {i}": i for i in range(6)}
    )  # score text: value
    score_range: tuple[float, float] = (0, 5)  # a score outside counts as none
    score_pattern: str = (
        ""  # regular expression whose group 1, of the last match, is the score; empty = parse_score
    )
    reward: tyro.conf.Fixed[Callable | None] = (
        None  # of external_reward; without one it reads judge_model's head
    )
    # pairs
    valid_score: Callable | None = None  # (score) -> bool
    valid_pair: Callable | None = None  # (score of the chosen, of the rejected) -> bool
    choose_pair: Callable | None = (
        None  # (scores, None for a missing one) -> (chosen, rejected) or None
    )
    # evaluation
    check: Callable | None = (
        None  # (prompt, response) -> bool or number: train_judge's labels; of rounds only reported
    )
    eval_fn: Callable | None = (
        None  # (model, tokenizer) -> {name: number}, after each stage; the first, higher, is better
    )
    eval_data: str = ""  # or conversations, whose loss counts
    max_drop: float | None = (
        None  # a stage that ends so far below the best is undone, the run goes on from there; none = never
    )


@dataclass
class EftConfig(Config):
    samples: str = ""  # JSONL of {"prompt", "completions", "scores"}; instead of scores a `check` in the config
    out: str = (
        "data/eft"  # prefix of .jsonl, judge rows to train on, and _val.jsonl, a tenth, held out
    )


KINDS = {
    "sft": train_sft,
    "dpo": train_dpo,
    "self_reward": train_dpo,
    "external_reward": train_dpo,
    "spin": train_dpo,
    "train_judge": train_sft,
    "new_prompts": None,
}
sft, dpo, self_reward, external_reward, spin, train_judge, new_prompts = (
    functools.partial(dict, kind=k) for k in KINDS
)
OWN = {f.name for f in dataclasses.fields(Config)}
# what changes no stage's data and weights, so that a restart may have it otherwise
FREE = {
    "stages",
    "recipe",
    "out_dir",
    "fresh",
    "device",
    "check",
    "eval_fn",
    "eval_data",
    "max_drop",
}
FREE_TRAIN = {
    "micro_bsz",
    "grad_cp",
    "chunk_len",
    "save_every",
    "keep_last",
    "log",
    "log_every",
    "eval_samples",
}


# ---------------------------------------------------------------------------------------------------------------------
# the method: scores, pairs, judge rows

WORDS = "score|rating|评分|得分|分数|スコア|점수|оценка|note|nota|punktzahl|puntuación|punteggio"
SCORE = re.compile(
    rf"""
    (?: (?P<word> (?<![a-z]) (?:{WORDS})s?
          (?: [^\n\d:：﹕︓=(]{{0,40}} (?:\([^)\n]{{0,40}}\))? [^\n\d:：﹕︓=]{{0,40}} [:：﹕︓=] | \s+(?:is|of)\b )? ) | ^ )
    (?: [^\w+\-−] | _ | -\s ){{0,20}}                             # bold, brackets, blanks; no sign
    (?P<number> [+\-−]?\d+(?:[.,]\d+)? ) (?! \d | [.,]\d | e\d | % | \s*[-–~]\s*\d )
    (?: \W{{0,4}} (?: [/／] | \b(?:out\ )?of\b ) \W{{0,4}} (?P<of> \d+ ) )?
    (?(word) | [^\w\n]{{0,20}}$ )                              # without the word: a line of its own
    """,
    re.I | re.M | re.X,
)


def parse_score(text, low=0, high=5, pattern=""):
    """The last score in a judge's text, "Score: 3.5", "**Score:** 4/5", or a number alone on its line; None without one,
    out of range, or of another scale. Never an exception. pattern: a regular expression whose group 1 is the score."""
    found = (
        list(re.finditer(pattern, text) if pattern else SCORE.finditer(text))
        if isinstance(text, str)
        else []
    )
    try:
        number, of = (found[-1][1], None) if pattern else found[-1].group("number", "of")
        value = float(number.replace(",", ".").replace("−", "-"))
    except (IndexError, ValueError, AttributeError):
        return None
    return value if low <= value <= high and (of is None or float(of) == high) else None


def choose_pair(scores):
    """[number or None] -> (index of the best, of the worst), the first of equal ones; None for a tie or fewer than two."""
    there = [s for s in scores if s is not None]
    return None if len(set(there)) < 2 else (scores.index(max(there)), scores.index(min(there)))


def make_pairs(rows, texts, scores, cfg):
    """prompt rows [P], texts and scores [P][N] -> (pairs, Counter of the prompts that gave none, by reason)"""
    pairs, dropped = [], Counter()
    for row, said, values in zip(rows, texts, scores):
        values = [
            v
            if v is not None and text.strip() and (not cfg.valid_score or call(cfg.valid_score, v))
            else None
            for v, text in zip(values, said)
        ]
        best, worst = call(cfg.choose_pair or choose_pair, values) or (0, 0)
        if sum(v is not None for v in values) < 2:
            dropped["fewer than two scores"] += 1
        elif best == worst:
            dropped["tie"] += 1
        elif said[best].strip() == said[worst].strip():
            dropped["same text"] += 1
        elif cfg.valid_pair and not call(cfg.valid_pair, values[best], values[worst]):
            dropped["not valid_pair"] += 1
        else:
            pairs.append(
                {
                    "prompt": row["prompt"],
                    "chosen": said[best],
                    "rejected": said[worst],
                    "chosen_score": values[best],
                    "rejected_score": values[worst],
                }
            )
    return pairs, dropped


def judge_metrics(scores, labels):
    """scores [P][N], None = none, labels [P][N] -> agreement: of two answers to a prompt with different labels, how often the
    scores say the same (a tie is wrong); spearman: mean rank correlation within prompts; best_vs_worst: how often the
    answer that a round would choose has a higher label than the one that it would reject."""
    right, rhos, pairs = [], [], []
    rank = lambda x: [sum(b < a for b in x) + sum(b == a for b in x) / 2 for a in x]  # noqa: E731
    for s, t in zip(scores, labels):
        s, t = ([x[i] for i in range(len(s)) if s[i] is not None] for x in (s, t))
        right += [a > b for a, x in zip(s, t) for b, y in zip(s, t) if x > y]
        if len(set(t)) > 1:
            rhos.append(statistics.correlation(rank(s), rank(t)) if len(set(s)) > 1 else 0.0)
        if pair := choose_pair(s):
            pairs.append(t[pair[0]] > t[pair[1]])
    return {
        name: statistics.fmean(x) if x else None
        for name, x in (("agreement", right), ("spearman", rhos), ("best_vs_worst", pairs))
    }


def make_eft(rows, texts, labels, cfg):
    """Prompt rows [P], answers and labels [P][N] -> judge rows, pairs for judge="head": of every prompt as many answers of one
    label as of another, or the judge learns which prompts are hard instead of which answers are good."""
    rng, out = random.Random(cfg.seed), []
    for row, said, given in zip(rows, texts, labels):
        by = {}
        for text, label in dict(zip(said, given)).items():
            if text.strip():
                by.setdefault(float(label), []).append(text)
        n = min(map(len, by.values())) if len(by) > 1 else 0
        picked = [
            (label, text) for label in sorted(by, reverse=True) for text in rng.sample(by[label], n)
        ]
        if cfg.judge == "head":
            out += [
                {"prompt": row["prompt"], "chosen": a, "rejected": b}
                for x, a in picked
                for y, b in picked
                if x > y
            ]
            continue
        for label, text in picked:
            score = min(cfg.judge_choices, key=lambda c: abs(cfg.judge_choices[c] - label))
            cue, score = (
                (cfg.judge_cue, score) if cfg.judge == "expected" else ("", cfg.judge_cue + score)
            )
            out.append({"prompt": render(cfg, row["prompt"], text) + cue, "completion": score})
    return out


# ---------------------------------------------------------------------------------------------------------------------
# the judge


def render(cfg, prompt, response):
    """The judge's text. Blank lines, which would end its turn, go; a prompt of several messages is shown with their roles."""
    if isinstance(prompt, list):
        prompt = "\n".join(
            f"{m['role'].capitalize()}: " * (len(prompt) > 1) + m["content"] for m in prompt
        )
    fields = {
        k: re.sub(r"\n{2,}", "\n", v.strip())
        for k, v in (("prompt", prompt), ("response", response))
    }
    if "{{" in cfg.judge_template or "{%" in cfg.judge_template:
        import jinja2

        return jinja2.Template(
            cfg.judge_template, undefined=jinja2.StrictUndefined, keep_trailing_newline=True
        ).render(fields)
    return cfg.judge_template.format(**fields)


def rubric(cfg):
    """What every text of the judge begins with: the template up to its first field."""
    try:
        re.compile(cfg.score_pattern)
        one, two = render(cfg, "<prompt>", "<response>"), render(cfg, "[prompt]", "[response]")
    except Exception as e:
        raise UserError(
            f"judge_template or score_pattern: {type(e).__name__}: {e}; fields: {{prompt}}, {{response}}"
        ) from None
    if missing := [name for name in ("prompt", "response") if f"<{name}>" not in one]:
        raise UserError(
            f"judge_template has no {{{missing[0]}}}; it needs {{prompt}} and {{response}}"
        )
    return os.path.commonprefix([one, two]).rstrip(
        " "
    )  # a blank is tokenised with the word behind it


class Judge:
    """A model that has read the rubric once; called with answers, it goes on from copies of that state."""

    def __init__(self, cfg, run):
        path = cfg.judge_model or cfg.init_from
        self.cfg, (self.model, self.tokenizer) = cfg, load(path, cfg, run)
        if cfg.judge == "head" and self.model.score is None:
            raise UserError(
                f"judge=head, but {path} has no score.weight; train_judge or train_reward.py makes one"
            )
        self.rubric = "" if cfg.judge == "head" else rubric(cfg)
        ids = self.tokenizer.encode(self.rubric)
        self.state = sample.prefill(self.model, [ids])[1] if ids else None

    def __call__(self, prompts, texts, numbers):
        """-> a row {"score", "parsed", …} for each answer; numbers: theirs, for the random streams"""
        cfg = self.cfg
        if cfg.judge == "head":
            there = [i for i, text in enumerate(texts) if text.strip()]
            groups, scores = (
                [list(g) for _, g in itertools.groupby(there, lambda i: prompts[i])],
                {},
            )  # a prompt is read once
            answers = {
                i: prepare.render_answer(prompts[i], texts[i], self.tokenizer) for i in there
            }
            rows = [
                prepare.Preference(answers[g[0]][0], [answers[i][1] for i in g], None)
                for g in groups
            ]
            with torch.no_grad():
                got = (
                    train_reward.rewards_of(self.model, rows, self.model.emb.weight.device)
                    if rows
                    else ()
                )
            for group, values in zip(groups, got):
                scores |= dict(zip(group, values.tolist()))
            return [{"score": scores.get(i), "parsed": 1} for i in range(len(texts))]
        whole = [
            render(cfg, prompt, text) + cfg.judge_cue * (cfg.judge == "expected")
            for prompt, text in zip(prompts, texts)
        ]
        if not all(text.startswith(self.rubric) for text in whole):
            raise UserError(
                "judge_template begins differently from answer to answer; keep conditions behind the rubric"
            )
        rest = [
            self.tokenizer.encode(text[len(self.rubric) :]) for text in whole
        ]  # apart from the rubric, as that was read
        if cfg.judge == "expected":
            choices, values = (
                [self.tokenizer.encode(c) for c in cfg.judge_choices],
                list(cfg.judge_choices.values()),
            )
            logps = sample.score_choices(self.model, rest, [choices] * len(rest), state=self.state)
            p = torch.tensor(logps, dtype=torch.float64).softmax(-1)
            return [
                {"score": s, "parsed": 1}
                for s in (p @ torch.tensor(values, dtype=torch.float64)).tolist()
            ]
        n = cfg.judge_samples
        got = sample.generate(
            self.model,
            rest,
            n=n,
            max_new_tokens=cfg.judge_max_tokens,
            temperature=cfg.judge_temperature,
            top_p=cfg.top_p,
            stop=cfg.stop,
            tokenizer=self.tokenizer,
            seed=cfg.seed + 1,
            state=self.state,
            indices=numbers,
            progress=False,
        )
        said = common.chunks([c.text for c in got], n)
        valid = [
            [
                s
                for t in texts
                if (s := parse_score(t, *cfg.score_range, cfg.score_pattern)) is not None
            ]
            for texts in said
        ]
        return [
            {"score": statistics.fmean(v) if v else None, "parsed": len(v) / n, "said": t}
            for v, t in zip(valid, said)
        ]


# ---------------------------------------------------------------------------------------------------------------------
# files: lines that a restart goes on from


def append_blocks(path, total, block, make, run, after=lambda kept: None):
    """Lines of `path`, dicts, a block at a time from make(i, j), which gives lines i to j; the processes take blocks in turn.
    A restart drops half a line and goes on; the blocks are always the same, so the numbers are too. -> all lines"""
    kept = []
    if run.main and path.exists():
        lines = path.read_bytes().split(b"\n")[:-1]  # what follows the last line's end was cut off
        os.truncate(path, sum(len(line) + 1 for line in lines))
        kept = [json.loads(line) for line in lines]
    kept = common.gather(kept)
    hidden = None if run.main else True  # None: hidden unless a terminal
    with (
        open(path, "ab") if run.main else contextlib.nullcontext() as f,
        tqdm(
            total=total, initial=len(kept), desc=f"{path.parent.name}/{path.stem}", disable=hidden
        ) as bar,
    ):
        for first in range(
            len(kept) // block * block if len(kept) < total else total, total, block * run.world
        ):
            i, new, error = first + run.rank * block, [], []
            try:
                new = make(i, min(i + block, total)) if i < total else []
            except UserError as e:
                error = [f"{e}; {path} keeps what was done before"]
            new, error = common.gather(new)[len(kept) - first :], common.gather(error)
            if error:
                raise UserError(error[0])
            if run.main:
                f.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in new).encode())
                f.flush()
            kept += new
            bar.update(len(new))
            after(kept)
    return kept


def write(path, rows, run):
    """JSON lines, or a dict, whole or not at all; every process waits for it."""
    if run.main:
        with common.atomic_write(path) as tmp:
            tmp.write_text(
                json.dumps(rows, indent=1)
                if isinstance(rows, dict)
                else "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            )
    common.gather([])


def claim(folder, settings, run):
    """Keep in stage.json what the stage is made with; an error if it was begun with something else."""
    book, settings = folder / "stage.json", json.loads(json.dumps(settings, default=common._show))
    was = json.loads(book.read_text()) if book.exists() else settings
    for key in sorted(k for k in was.keys() | settings.keys() if was.get(k) != settings.get(k)):
        then, now = (str(x.get(key))[:60] for x in (was, settings))
        raise UserError(
            f"{folder} was begun with {key}={then!r}, now {now!r}: put it back; or delete there what shall be "
            "made again, and stage.json; or --fresh"
        )
    common.gather([])  # all have read it
    write(book, settings, run)


WRITTEN = re.compile(
    r"(candidates|scores|pairs|eft|prompts|metrics)\.jsonl(\.ref\.pt)?|(done|config|stage)\.json|last\.pt|"
    r"best\.\w+|(metrics|rewards)\.png|(rwkv|lora|state)-(\d+|final)\.\w+|tokenizer\.\w+|vocab\.txt"
)


def clear(out, run):
    """--fresh: delete what stages wrote; other files stay, and their folders."""
    for folder in [book.parent for book in out.glob("[0-9][0-9]-*/stage.json")] if run.main else ():
        for file in folder.iterdir():
            if WRITTEN.fullmatch(file.name):
                file.unlink()
        with contextlib.suppress(OSError):  # not empty
            folder.rmdir()
    common.gather([])


def call(function, *args):
    """A function of the config file; UserError names it, and what it was given."""
    try:
        return function(*args)
    except Exception as e:
        given = ", ".join(f"{a!r:.60}" for a in args if isinstance(a, (str, int, float, list)))
        raise UserError(
            f"{common._show(function)}({given}) of the config failed: {type(e).__name__}: {e}"
        ) from e


# ---------------------------------------------------------------------------------------------------------------------
# stages: cfg has the stage's own settings, and in init_from, judge_model and prompts what the stages before left; each returns
# what it changes of these, and a "report"


def load(path, cfg, run):
    """Weights, a LoRA or a state by path -> (model, tokenizer)"""
    if not path:
        raise UserError("which model? --init_from=FILE, the .pth or .safetensors to start from")
    model, about = load_model(path, run.device, run.dtype)
    known = about.get("tokenizer") or (Path(path).parent / "config.json").is_file()
    return model.eval(), prepare.tokenizer_of(
        path, model.config.vocab_size, "" if known else cfg.tokenizer, about
    )


def train(script, cfg, stage, folder, keep=True, **over):
    """script.main in the stage's folder, from cfg.init_from or on from last.pt. keep: a LoRA or a state is trained further,
    else only its base is begun from. -> the file that it made"""
    fields, about = (
        {f.name for f in dataclasses.fields(script.Config)},
        load_model(cfg.init_from)[1],
    )
    given = {
        **{k: getattr(cfg, k) for k in ("seed", "device", "dtype", "tokenizer")},
        **stage,
        **over,
        "out_dir": str(folder),
        "init_from": base_of(cfg.init_from, about) if about else cfg.init_from,
        "resume": (folder / "last.pt").exists(),
    }
    if about and keep:
        given["adapter"] = cfg.init_from
    script.main(script.Config(**{k: v for k, v in given.items() if k in fields}))
    common.gather([])  # rank 0 has written it
    return str(next(f for f in folder.glob("*-final.*") if f.suffix in (".pth", ".safetensors")))


def part(rows, cfg):
    """This round's share of a file's rows"""
    rows = rows[
        cfg.first_prompt : None if cfg.max_prompts is None else cfg.first_prompt + cfg.max_prompts
    ]
    if not rows:
        raise UserError(
            f"no prompts from number {cfg.first_prompt}: first_prompt is beyond the file's end"
        )
    return rows


def read_prompts(cfg, tokenizer):
    """[(ids, row)] of this round. UserError for a prompt that is there twice."""
    rows, seen = train_grpo.read_prompts(cfg.prompts, tokenizer, 10**9), {}
    for number, (ids, _) in enumerate(rows, 1):
        if seen.setdefault(tuple(ids), number) != number:
            raise UserError(
                f"{cfg.prompts}: prompts {seen[tuple(ids)]} and {number} are the same; drop one"
            )
    return part(rows, cfg)


def last_words(prompt):
    """a prompt's text, of messages the last one's"""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def checked(cfg, answers):
    """labels [P][N] of the config's `check`"""
    return common.chunks(
        [float(call(cfg.check, c["prompt"], c["text"])) for c in answers], cfg.num_candidates
    )


def candidates(cfg, folder, rows, model, tokenizer, run, stop=None):
    """num_candidates answers to each prompt, through candidates.jsonl"""
    n = cfg.num_candidates

    def make(i, j):
        got = sample.generate(
            model,
            [ids for ids, _ in rows[i // n : j // n]],
            n=n,
            max_new_tokens=cfg.max_completion_length,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            stop=stop or cfg.stop,
            tokenizer=tokenizer,
            seed=cfg.seed,
            indices=range(i // n, j // n),
            progress=False,
        )
        return [
            {
                "number": k // n,
                "candidate": k % n,
                "prompt": rows[k // n][1]["prompt"],
                "text": c.text,
                "tokens": len(c.tokens),
                "finish_reason": c.finish_reason,
            }
            for k, c in enumerate(got, i)
        ]

    return append_blocks(folder / "candidates.jsonl", len(rows) * n, cfg.block * n, make, run)


def judgements(cfg, folder, answers, rows, judge, run):
    """A score for each candidate, through scores.jsonl. judge: a Judge, or a reward function"""

    def make(i, j):
        part = answers[i:j]
        prompts, texts = [c["prompt"] for c in part], [c["text"] for c in part]
        if isinstance(judge, Judge):
            got = judge(prompts, texts, range(i, j))
        else:
            every = [rows[c["number"]][1] for c in part]
            scores = train_grpo.call_reward(judge, prompts, texts, train_grpo.columns_of(every))
            got = [{"score": s, "parsed": int(s is not None)} for s in scores]
        return [
            {"number": c["number"], "candidate": c["candidate"], **row} for c, row in zip(part, got)
        ]

    def stop_if_none(kept):
        if all(row["score"] is None for row in kept):
            said = "; ".join(repr(t[-120:]) for row in kept[:3] for t in row.get("said", [])[:1])
            said = f"; the judge said {said}" * bool(said)
            raise UserError(
                f"no valid score in {len(kept)} judgements, which {folder / 'scores.jsonl'} has{said}. Change "
                "template, score_pattern or judge, delete that file and stage.json, run again"
            )

    return append_blocks(
        folder / "scores.jsonl",
        len(answers),
        cfg.block * cfg.num_candidates,
        make,
        run,
        stop_if_none,
    )


def round_(stage, cfg, folder, run):
    """self_reward, external_reward, spin: candidates, scores, pairs, DPO"""
    (model, tokenizer), spins, n = (
        load(cfg.init_from, cfg, run),
        stage["kind"] == "spin",
        cfg.num_candidates,
    )
    rows = spin_prompts(cfg, stage["data"], tokenizer) if spins else read_prompts(cfg, tokenizer)
    answers = candidates(cfg, folder, rows, model, tokenizer, run)
    report = {"candidate_tokens": statistics.fmean(c["tokens"] for c in answers)}
    texts = common.chunks([c["text"] for c in answers], n)
    del model
    if spins:
        pairs = [
            {**row, "rejected": text}
            for (_, row), (text,) in zip(rows, texts)
            if text.strip() not in ("", row["chosen"].strip())
        ]
        dropped = {"empty or equal": len(rows) - len(pairs)}
    else:
        by_function = stage["kind"] == "external_reward" and cfg.reward
        scores = judgements(
            cfg, folder, answers, rows, cfg.reward if by_function else Judge(cfg, run), run
        )
        each = common.chunks([s["score"] for s in scores], n)
        pairs, dropped = make_pairs([row for _, row in rows], texts, each, cfg)
        report |= {
            "score": statistics.fmean(s["score"] for s in scores if s["score"] is not None),
            "parse_rate": statistics.fmean(s["parsed"] for s in scores),
        }
        if cfg.check:
            report |= judge_metrics(each, checked(cfg, answers))
    print0(f"{folder}: {len(pairs)} pairs of {len(rows)} prompts; dropped: {dict(dropped)}")
    if not pairs:
        raise UserError(
            f"{folder}: no pairs of {len(rows)} prompts, {dict(dropped)}; its candidates and scores tell why"
        )
    write(folder / "pairs.jsonl", pairs, run)
    weights = train(train_dpo, cfg, stage, folder, data=str(folder / "pairs.jsonl"))
    return {"init_from": weights, "report": {**report, "pairs": len(pairs), "dropped": dropped}}


def spin_prompts(cfg, path, tokenizer):
    """Conversations -> [(ids, {"prompt", "chosen"})]: the last reply is the chosen answer."""
    out = []
    for where, row in part(list(prepare.read_jsonl(path, prepare.SHAPES)), cfg):
        *prompt, chosen = row.get("messages") or [None]
        prompt, chosen = (
            (prompt, chosen.get("content"))
            if chosen
            else (row.get("prompt"), row.get("completion"))
        )
        try:
            out.append(
                (
                    prepare.render_answer(prompt, chosen, tokenizer)[0],
                    {"prompt": prompt, "chosen": chosen},
                )
            )
        except UserError as e:
            raise UserError(f"{where}: {e}") from None
    return out


def judge_stage(stage, cfg, folder, run):
    """train_judge: own answers, labelled and balanced -> an adapter that judges; measured on the last tenth of the prompts"""
    model, tokenizer = load(cfg.init_from, cfg, run)
    rows, n, tune = read_prompts(cfg, tokenizer), cfg.num_candidates, stage.get("tune", "lora")
    answers = candidates(cfg, folder, rows, model, tokenizer, run)
    train_on, held = split(
        [row for _, row in rows],
        common.chunks([c["text"] for c in answers], n),
        checked(cfg, answers),
    )
    script = train_reward if cfg.judge == "head" else train_state if tune == "state" else train_sft
    eft = make_eft(*train_on, cfg)
    if not eft:
        raise UserError(
            f"{folder}: no prompt has answers of different labels; take more candidates or a higher temperature"
        )
    write(folder / "eft.jsonl", eft, run)
    file = train(script, cfg, stage, folder, keep=False, data=str(folder / "eft.jsonl"), tune=tune)
    metrics = measure_judge(dataclasses.replace(cfg, judge_model=file), *held, run)
    return {"judge_model": file, "report": {"pairs": len(eft), **metrics}}


def split(*lists):
    """-> their first nine tenths, which train, and the last, which measures"""
    cut = round(len(lists[0]) * 0.9)
    return [x[:cut] for x in lists], [x[cut:] for x in lists]


def measure_judge(cfg, rows, texts, labels, run):
    judge = Judge(cfg, run)
    scores = [
        [
            x["score"]
            for x in judge([row["prompt"]] * len(said), said, range(1000 * p, 1000 * p + len(said)))
        ]
        for p, (row, said) in enumerate(zip(rows, texts))
    ]
    metrics = judge_metrics(scores, labels)
    print0(
        f"{cfg.judge_model}, {len(rows)} held-out prompts: "
        + ", ".join(f"{k} {cell(v) or '-'}" for k, v in metrics.items())
    )
    return metrics


def new_prompt_stage(stage, cfg, folder, run):
    """new_prompts: the model goes on after 8 prompts drawn from the seeds; one that is too like another is dropped"""
    model, tokenizer = load(cfg.init_from, cfg, run)
    rows = train_grpo.read_prompts(stage["seeds"], tokenizer, 10**9)
    seeds, rows = [" ".join(last_words(row["prompt"]).split()) for _, row in rows], []
    for k in range(cfg.max_prompts or 1000):
        shown = random.Random(f"{cfg.seed} {k}").sample(seeds, min(8, len(seeds)))
        text = (
            "".join(f"Task {i}: {seed}\n" for i, seed in enumerate(shown, 1))
            + f"Task {len(shown) + 1}:"
        )
        rows.append((tokenizer.encode(text), {"prompt": text}))
    made, known = [], [seed.split() for seed in seeds]
    for c in candidates(
        dataclasses.replace(cfg, num_candidates=1), folder, rows, model, tokenizer, run, stop="\n"
    ):
        words = c["text"].split()
        if words and not alike(words, known):
            known.append(words)
            made.append({"prompt": [{"role": "user", "content": c["text"].strip()}]})
    print0(
        f"{folder}: {len(made)} new prompts of {len(rows)}, the others empty or too like another"
    )
    if not made:
        raise UserError(
            f"{folder}: no new prompts; candidates.jsonl there has what the model wrote"
        )
    write(folder / "prompts.jsonl", made, run)
    return {"prompts": str(folder / "prompts.jsonl"), "report": {"pairs": len(made)}}


def alike(words, known):
    """whether one of `known` has 0.7 of its words in common with these, in the same order: about ROUGE-L"""
    return bool(difflib.get_close_matches(words, known, 1, 0.7))


# ---------------------------------------------------------------------------------------------------------------------


def measure(cfg, weights, run):
    """Of a model that a stage made: {"eval": numbers, "value": the one that counts, "tokens": of answers, "kl": to the start}"""
    (model, tokenizer), out = load(weights, cfg, run), {}
    if cfg.eval_fn:
        out["eval"] = call(cfg.eval_fn, model, tokenizer)
        out["value"] = next(iter(out["eval"].values()))
    elif cfg.eval_data:
        plain = train_sft.Config()
        out["eval"] = evaluate(
            model, prepare.read_examples(cfg.eval_data, tokenizer, plain.ctx_len), plain, run
        )
        out["value"] = -out["eval"]["val_loss"]
    if cfg.prompts:
        ids = [ids for ids, _ in train_grpo.read_prompts(cfg.prompts, tokenizer, 10**9)[:64]]
        got = sample.generate(
            model,
            ids,
            max_new_tokens=cfg.max_completion_length,
            stop=cfg.stop,
            tokenizer=tokenizer,
            seed=cfg.seed,
            progress=False,
        )
        start = sample.score_choices(
            load(cfg.init_from, cfg, run)[0], ids, [[c.tokens] for c in got]
        )
        out["kl"] = statistics.fmean(sum(c.logprobs) - logp for c, (logp,) in zip(got, start))
        out["tokens"] = statistics.fmean(len(c.tokens) for c in got)
    return common.gather([out] if run.main else [])[0]


def check_stages(cfg):
    """-> the list of stages. UserError, before anything runs, for a name that is no stage and a setting that is none."""
    if isinstance(cfg.stages, dict) and cfg.recipe not in ("", *cfg.stages):
        raise UserError(f"recipe={cfg.recipe}: the config has {', '.join(cfg.stages)}")
    stages = (
        cfg.stages[cfg.recipe or next(iter(cfg.stages))]
        if isinstance(cfg.stages, dict)
        else cfg.stages
    )
    near = lambda x, names: "".join(
        f"; did you mean {n!r}?" for n in difflib.get_close_matches(str(x), names, 1)
    )  # noqa: E731
    if not stages:
        raise UserError(
            "no stages; give a config file with stages = [sft(...), self_reward(...), …]"
        )
    for number, stage in enumerate(stages, 1):
        kind = stage.get("kind") if isinstance(stage, dict) else stage
        if not isinstance(stage, dict) or kind not in KINDS:
            raise UserError(
                f"stage {number}: there is no stage {kind!r}{near(kind, KINDS)} There are {', '.join(KINDS)}"
            )
        scripts = [
            s for s in (KINDS[kind], *(train_state, train_reward) * (kind == "train_judge")) if s
        ]
        known = (
            OWN - FREE
            | {"kind", "data", "seeds"}
            | {f.name for s in scripts for f in dataclasses.fields(s.Config)}
        )
        for key in [
            key for key in stage if key not in known - {"out_dir", "init_from", "resume", "eval_fn"}
        ]:
            raise UserError(
                f"stage {number}, {kind}: {key!r} is none of its settings{near(key, known)}"
            )
        own = dataclasses.replace(cfg, **{k: v for k, v in stage.items() if k in OWN})
        need = {
            "sft": "data",
            "dpo": "data",
            "spin": "data",
            "new_prompts": "seeds",
            "train_judge": "check",
        }.get(kind, "kind")
        if not stage.get(need) and not getattr(own, need, None):
            raise UserError(
                f"stage {number}, {kind}: it needs {need}"
                + " in the config file" * (need == "check")
            )
        if kind in ("self_reward", "train_judge") and own.judge != "head":
            rubric(own)
    return stages


@common.launch
def main(cfg, run):
    stages, out, history = check_stages(cfg), Path(cfg.out_dir), []
    if cfg.fresh:
        clear(out, run)
    now = {key: getattr(cfg, key) for key in ("init_from", "judge_model", "prompts")}
    for number, stage in enumerate([{"kind": "start"}, *stages]):
        kind, folder = stage["kind"], out / f"{number:02d}-{stage['kind']}"
        # another seed for each stage; SPIN has one answer to a prompt; what has no reward function is scored by a head
        own = {
            **now,
            "seed": cfg.seed + 1000 * number,
            **{k: v for k, v in stage.items() if k in OWN},
        }
        own |= {"spin": {"num_candidates": 1}, "external_reward": {"judge": "head"}}.get(kind, {})
        own = dataclasses.replace(cfg, **own)
        claim(
            folder,
            {k: v for k, v in {**vars(own), **stage}.items() if k not in FREE | FREE_TRAIN},
            run,
        )
        print0(
            f"{folder}: "
            + ", ".join(f"{k}={common._show(v)}" for k, v in stage.items() if k != "kind")
        )
        if (folder / "done.json").exists():
            print0(f"{folder} is complete")
            done = json.loads((folder / "done.json").read_text())
        else:
            if kind == "start":
                done = {"init_from": cfg.init_from}
            elif kind in ("sft", "dpo"):
                done = {"init_from": train(KINDS[kind], own, stage, folder)}
            else:
                done = {"train_judge": judge_stage, "new_prompts": new_prompt_stage}.get(
                    kind, round_
                )(stage, own, folder, run)
            done |= {
                "stage": folder.name,
                **(measure(cfg, done["init_from"], run) if "init_from" in done else {}),
            }
            best = max((h for h in history if "value" in h), key=lambda h: h["value"], default=None)
            if (
                best
                and "value" in done
                and cfg.max_drop is not None
                and done["value"] < best["value"] - cfg.max_drop
            ):
                print0(
                    f"{folder} is undone: {done['value']:.4f} after {best['value']:.4f}; the run goes on from {best['stage']}"
                )
                done |= {"undone": done["init_from"], "init_from": best["init_from"]}
            write(folder / "done.json", done, run)
        now = {key: done.get(key, value) for key, value in now.items()}
        history.append(done)
        if run.main:
            write_report(out, [{**h.get("report", {}), **h} for h in history])
    print0(f"done: {now['init_from']}; {out / 'report.md'}")


COLUMNS = {
    "evaluation": "value",
    "score": "score",
    "parse rate": "parse_rate",
    "judge agreement": "agreement",
    "spearman": "spearman",
    "best vs worst": "best_vs_worst",
    "pairs": "pairs",
    "answer tokens": "tokens",
    "KL to start": "kl",
}


def cell(value):
    return "" if value is None else f"{value:.3f}" if isinstance(value, float) else str(value)


def write_report(out, rows):
    """report.md and report.png, from every stage's done.json and pairs.jsonl"""
    lines = [
        "Evaluation, answer tokens and KL (nats an answer) are of the model that the stage left; score, judge and pairs are "
        "of the answers that it was trained on.",
        "",
        f"| stage | {' | '.join(COLUMNS)} |",
        "|---" * (len(COLUMNS) + 1) + "|",
    ]
    lines += [
        f"| {r['stage']}{' (undone)' * ('undone' in r)} | {' | '.join(cell(r.get(k)) for k in COLUMNS.values())} |"
        for r in rows
    ]
    lines += ["", "![score and length](report.png)"]
    for r in rows:
        lines += (
            ["", f"## {r['stage']}: dropped {r['dropped'] or 'none'}"] if "dropped" in r else []
        )
        path = out / r["stage"] / "pairs.jsonl"
        for row in map(json.loads, path.read_text().splitlines()[:12] if path.exists() else ()):
            for name, text in (
                ("prompt", last_words(row["prompt"])),
                ("chosen", row["chosen"]),
                ("rejected", row["rejected"]),
            ):
                score = " " + cell(row[name + "_score"]) if name + "_score" in row else ""
                lines += [
                    *[""] * (name == "prompt"),
                    f"    {name}{score}: " + text.strip()[:1000].replace("\n", "\n    "),
                ]
    with common.atomic_write(out / "report.md") as tmp:
        tmp.write_text("\n".join(lines) + "\n")
    with common.figure(out / "report.png") as left:
        right = left.twinx()
        for ax, key, name, look in (
            (left, "score", "score", "C0.-"),
            (left, "value", "evaluation", "C2.-"),
            (right, "tokens", "answer tokens", "C1.--"),
        ):
            if points := [(i, r[key]) for i, r in enumerate(rows) if r.get(key) is not None]:
                ax.plot(*zip(*points), look, label=name)
        left.set(xticks=range(len(rows)), ylabel="score, evaluation")
        left.set_xticklabels([r["stage"] for r in rows], rotation=15, fontsize=7)
        right.set_ylabel("tokens")
        if left.lines or right.lines:
            left.figure.legend(fontsize=7)


@common.launch
def make_eft_command(cfg, run):
    """make-eft: answers with scores, or a `check` -> OUT.jsonl, to train a judge on (train_sft.py; judge=head: train_reward.py),
    and OUT_val.jsonl; with --judge_model how well that judge does there"""
    rows, texts, labels = [], [], []
    for where, row in prepare.read_jsonl(
        cfg.samples, '{"prompt", "completions": [...], "scores": [...]}'
    ):
        texts.append(
            [c["text"] if isinstance(c, dict) else c for c in row.get("completions") or ()]
        )
        labels.append(
            row.get("scores")
            or [
                float(call(cfg.check, row["prompt"], text))
                for text in texts[-1]
                if cfg.check and "prompt" in row
            ]
        )
        if not texts[-1] or len(texts[-1]) != len(labels[-1]) or "prompt" not in row:
            raise UserError(
                f"{where}: want a prompt, completions and as many scores, or a `check` in the config: {row!r:.50}"
            )
        rows.append(row)
    train_on, held = split(rows, texts, labels)
    write(Path(f"{cfg.out}.jsonl"), eft := make_eft(*train_on, cfg), run)
    write(
        Path(f"{cfg.out}_val.jsonl"),
        [{"prompt": r["prompt"], "completions": t, "scores": s} for r, t, s in zip(*held)],
        run,
    )
    print0(
        f"{cfg.out}.jsonl: {len(eft)} rows of {len(train_on[0])} prompts; {cfg.out}_val.jsonl: {len(held[0])} prompts"
    )
    if cfg.judge_model:
        measure_judge(cfg, *held, run)


if __name__ == "__main__":
    if sys.argv[1:2] == ["make-eft"]:
        make_eft_command(load_config(EftConfig, sys.argv[2:]))
    else:
        main(load_config(Config))
