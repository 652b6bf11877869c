"""Self-rewarding language models: answer, judge, pair, DPO, round after round, all on disk.

    candidates.jsonl   num_candidates answers to each prompt by the current model, a line each
    scores.jsonl       what the judge thinks of each, a line each
    pairs.jsonl        best against worst; ties, equal texts and prompts with fewer than two scores
                       are dropped, and counted
    rwkv-final.pth     DPO on the pairs against the round's own starting point, by train_dpo.py

`stages` is a list of these, in any order. A stage takes the settings of Config and of the script
that trains it, side by side:

    sft(data=), dpo(data=)       train_sft.py, train_dpo.py
    self_reward(prompts=)        a round; the judge is the current model, or judge_model: weights, a
                                 LoRA or a state
    external_reward(reward=)     a round with a function (prompts, completions, **columns) ->
                                 numbers, as in train_grpo.py; without one judge_model's scalar head
    spin(data=)                  chosen: the data's answer, rejected: the model's own; beta is the
                                 paper's lambda
    train_judge(prompts=)        own answers, labelled by `check`, train a LoRA (tune="state": a
                                 state) that judges from then on

Each stage has a folder out_dir/NN-name. At a restart a complete one is skipped, and one that was
cut off goes on at its line or its checkpoint (save_every). After each stage the first number of
eval_fn, or the negative loss on eval_data, says how good the model is; higher is better.

The judge of an RNN: what the template says before its first field is read once, and every answer
goes on from a copy of that state. judge="sample" parses the score that it writes; "expected" is the
mean of the values of judge_choices under their probabilities, one pass and nothing to parse; "head"
reads a scalar head (train_reward.py).

Papers: Yuan et al., arXiv 2401.10020; SPIN, 2401.01335.

Usual mistakes: measuring a judge on another model's answers; no control (as much more SFT); length
that grows with the score (report.md shows it); plain DPO on a small model (see nll_coef).

    python self_reward.py config/self_reward_tiny.py                    0.747 -> 0.769 -> 0.772
    python self_reward.py config/self_reward_tiny.py --recipe=external_reward
                                                                        0.751 -> 0.862 -> 0.903
    torchrun --nproc_per_node=8 self_reward.py config/self_reward_1b5.py          eight GPUs
"""

import contextlib
import dataclasses
import difflib
import functools
import itertools
import json
import math
import re
import statistics
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import train_dpo
import train_reward
import train_sft
import train_state
from gosling import config, engine, files, runs, schemas, user_code
from gosling.answers import score_choices
from gosling.batch import evaluate
from gosling.config import Seed, Share, UserError, load_config, print0, show
from gosling.data import read_examples, read_jsonl, read_prompts, read_replies
from gosling.judge import Judge, make_eft, parse_score, rubric
from gosling.rewards import call_reward, columns_of
from gosling.tune import load_model
from gosling.weights import base_of

import tyro
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from tqdm import tqdm

__all__ = ["choose_pair", "parse_score"]  # imported from here by code outside this repository
POINTS = {" 0": 0, " 1": 1, " 2": 2, " 3": 3, " 4": 4, " 5": 5}


@dataclass
class Config:
    # stages
    stages: tyro.conf.Fixed[list | dict] = field(default_factory=list)  # as above; or {name: list}
    recipe: str = ""  # which of several lists; empty = the first
    # data and model
    prompts: str = ""  # JSONL of {"prompt": text or messages, columns …}, no prompt twice
    first_prompt: NonNegativeInt = 0  # where in that file a round begins
    skip_bad: bool = False  # leave out and count rows that cannot be read
    max_prompts: PositiveInt | None = None  # at most so many of them; none = all that follow
    tokenizer: str = ""  # name or file; empty = the one recorded with the model or the data
    init_from: str = ""  # weights to start from (.pth, .safetensors)
    another_base: bool = False  # an adapter or state of another base than this is meant
    # run
    out_dir: str = "out/self_reward"  # folder for checkpoints, last.pt, config.json and metrics
    fresh: bool = False  # start over: delete what was written in out_dir, and nothing else
    seed: Seed = 42  # of the data order, of sampling, and of what begins at random
    device: str = "auto"  # auto, cpu, cuda, cuda:1, mps
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # to compute in; auto = bfloat16 on CUDA
    hang_minutes: PositiveFloat = 60.0  # longest wait of processes for one another
    shard: Literal["none", "fsdp"] = "none"  # several processes: all weights in each, or a share
    # candidates
    num_candidates: PositiveInt = 4  # answers to each prompt
    max_completion_length: PositiveInt = 512  # longest completion in tokens
    temperature: NonNegativeFloat = 0.7  # of sampling
    top_p: Share = 0.9  # of sampling: total of the likeliest tokens
    stop: tuple[str, ...] = ("\n\nUser:",)  # texts that end a completion, besides the end id
    block: PositiveInt = 32  # prompts that are sampled, judged and written together
    # judge
    judge: Literal["sample", "expected", "head"] = "sample"  # as above
    judge_model: str = ""  # weights, a LoRA or a state; empty = the current model
    judge_template: str = ""  # with {prompt} and {response}, or jinja2: config/self_reward_1b5.py
    judge_samples: PositiveInt = 3  # judgements of an answer, averaged over those with a score
    judge_temperature: NonNegativeFloat = 0.7  # of judgements
    judge_max_tokens: PositiveInt = 200  # most tokens of a judgement
    judge_cue: str = " Score:"  # follows the template where the score is read at once (expected)
    judge_choices: tyro.conf.Fixed[dict] = field(default_factory=POINTS.copy)  # score text: value
    score_range: tuple[float, float] = (0, 5)  # a score outside counts as none
    score_pattern: str = ""  # regex, group 1 of the last match is the score; empty = parse_score
    reward: tyro.conf.Fixed[Callable | None] = None  # of your own, as the docstring says
    reward_seconds: PositiveFloat | None = None  # longest call of a reward …; none = no limit
    # pairs
    valid_score: Callable | None = None  # (score) -> bool
    valid_pair: Callable | None = None  # (score of the chosen, of the rejected) -> bool
    choose_pair: Callable | None = None  # (scores or None) -> (chosen, rejected) or None
    # evaluation
    check: Callable | None = None  # (prompt, response) -> number: labels of train_judge, of reports
    eval_fn: Callable | None = None  # of your own: (model, tokenizer) -> {name: number}
    eval_seconds: PositiveFloat | None = None  # longest time of eval_fn; none = no limit
    eval_data: str = ""  # or conversations, whose loss counts
    max_drop: NonNegativeFloat | None = None  # undo a stage that falls so far below the best


SCRIPTS = {  # whose settings a stage takes, besides those above
    "sft": (train_sft,),
    "dpo": (train_dpo,),
    "self_reward": (train_dpo,),
    "external_reward": (train_dpo,),
    "spin": (train_dpo,),
    "train_judge": (train_sft, train_state, train_reward),
}
# What every script of a stage has from here, unless the stage says otherwise.
SHARED = ("seed", "device", "dtype", "shard", "tokenizer", "skip_bad", "another_base")
sft = functools.partial(dict, kind="sft")
dpo = functools.partial(dict, kind="dpo")
self_reward = functools.partial(dict, kind="self_reward")
external_reward = functools.partial(dict, kind="external_reward")
spin = functools.partial(dict, kind="spin")
train_judge = functools.partial(dict, kind="train_judge")

# ----------------------------------------------------------------------------------------------
# the method: pairs, and how good a judge is


def choose_pair(scores):
    """[number or None] -> (index of the best, of the worst), the first of equal ones.

    None if all are equal or fewer than two have a score.
    """
    numbers = [score for score in scores if score is not None]
    if len(set(numbers)) < 2:
        return None
    return scores.index(max(numbers)), scores.index(min(numbers))


def make_pair(row, texts, scores, cfg):
    """A prompt's row, its answers and their scores -> (pair or None, why there is none)."""
    valid = []
    for text, score in zip(texts, scores, strict=True):
        is_valid = score is not None and text.strip() != ""
        if is_valid and cfg.valid_score:
            is_valid = call(cfg, cfg.valid_score, score)
        valid.append(score if is_valid else None)
    if sum(score is not None for score in valid) < 2:
        return None, "fewer than two scores"
    best, worst = call(cfg, cfg.choose_pair or choose_pair, valid) or (0, 0)
    if best == worst:
        return None, "tie"
    if texts[best].strip() == texts[worst].strip():
        return None, "same text"
    if cfg.valid_pair and not call(cfg, cfg.valid_pair, valid[best], valid[worst]):
        return None, "not valid_pair"
    pair = {
        "prompt": row["prompt"],
        "chosen": texts[best],
        "rejected": texts[worst],
        "chosen_score": valid[best],
        "rejected_score": valid[worst],
    }
    return pair, ""


def mean(values):
    """The mean, or None of no values."""
    return statistics.fmean(values) if values else None


def ranks(values):
    """The rank of each value; equal ones share theirs."""
    return [sum(x < value for x in values) + values.count(value) / 2 for value in values]


def judge_metrics(scores, labels):
    """How well a judge's scores [P][N], None for a missing one, follow the labels [P][N].

    agreement: of two answers to a prompt with different labels, how often the scores say the same
    (a tie is wrong). spearman: the mean rank correlation within prompts. best_vs_worst: how often
    the answer that a round would choose has a higher label than the one that it would reject.
    """
    agreement, spearman, best_vs_worst = [], [], []
    for prompt_scores, prompt_labels in zip(scores, labels, strict=True):
        answers = zip(prompt_scores, prompt_labels, strict=True)
        scored = [(score, label) for score, label in answers if score is not None]
        for (score_a, label_a), (score_b, label_b) in itertools.permutations(scored, 2):
            if label_a > label_b:
                agreement.append(score_a > score_b)
        given, true = [score for score, _ in scored], [label for _, label in scored]
        if len(set(true)) > 1:
            defined = len(set(given)) > 1
            rho = statistics.correlation(ranks(given), ranks(true)) if defined else 0.0
            spearman.append(rho)
        pair = choose_pair(given)
        if pair:
            best_vs_worst.append(true[pair[0]] > true[pair[1]])
    return {
        "agreement": mean(agreement),
        "spearman": mean(spearman),
        "best_vs_worst": mean(best_vs_worst),
    }


# ----------------------------------------------------------------------------------------------
# files: lines that a restart goes on from


def append_blocks(path, total, block, make, run, kind=dict, check_rows=None):
    """Write `total` lines to `path`, dicts, a block at a time -> all of them.

    make(i, j) gives lines i to j; the processes take blocks in turn. A restart drops half a line
    and goes on; the blocks are always the same, so the numbers are too. check_rows: called with
    what there is after each block. kind: of a line, see files.checked.
    """
    rows = runs.gather(files.whole_lines(path, kind) if run.main else [])
    if len(rows) > total:
        raise UserError(f"{path} has {len(rows)} lines, expected {total}; remove it, run again")
    start = total if len(rows) >= total else len(rows) // block * block
    title = f"{path.parent.name}/{path.stem}"
    hidden = None if run.main else True  # None: hidden unless on a terminal
    with tqdm(desc=title, total=total, initial=len(rows), disable=hidden) as bar:
        for first in range(start, total, block * run.world):
            i, block_rows, errors = first + run.rank * block, [], []
            try:
                if i < total:
                    block_rows = make(i, min(i + block, total))
            except UserError as e:
                errors = [f"{e}; {path} keeps what was done before"]
            new_rows = runs.gather(block_rows)[len(rows) - first :]
            errors = runs.gather(errors)
            if errors:
                raise UserError(errors[0])
            if run.main:
                with open(path, "a", encoding="utf-8") as f:
                    f.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in new_rows)
            rows += new_rows
            bar.update(len(new_rows))
            if check_rows:
                check_rows(rows)
    return rows


def check_numbers(path, rows, n, prompts=None):
    """UserError unless line i is of prompt i // n, which it has if given, and candidate i % n."""
    for i, row in enumerate(rows):
        is_there = (row["number"], row["candidate"]) == (i // n, i % n)
        if not is_there or (prompts and row["prompt"] != prompts[i // n]):
            raise UserError(
                f"{path}:{i + 1} is not candidate {i % n} of prompt {i // n}; put the prompts back "
                "that it is of, or remove it and run again"
            )


def write(path, value, run):
    """A list as JSON Lines, a dict as JSON; every process waits for it."""
    if run.main and isinstance(value, dict):
        files.write_json(path, value)
    elif run.main:
        files.write_jsonl(path, value)
    runs.gather([])


# What changes no stage's data and weights, so that a restart may have it otherwise.
FREE = ("stages", "recipe", "out_dir", "fresh", "device", "shard", "check")
FREE += ("eval_fn", "eval_data", "eval_seconds", "reward_seconds", "compile")
FREE += ("max_drop", "micro_bsz", "grad_cp", "chunk_len", "save_every", "keep_last", "log")
FREE += ("log_every", "eval_samples")


def claim(folder, settings, run):
    """Keep in stage.json what the stage is made with; UserError if it was begun otherwise."""
    path = folder / "stage.json"
    settings = {key: value for key, value in settings.items() if key not in FREE}
    settings = json.loads(json.dumps(settings, default=show))
    before = files.read_json(path) if path.exists() else settings
    for key in sorted(before.keys() | settings.keys()):
        old, new = before.get(key), settings.get(key)
        if old != new:
            raise UserError(
                f"{folder} was begun with {key}={str(old)[:60]!r}, now {str(new)[:60]!r}: put it "
                "back; or delete there what shall be made again, and stage.json; or --fresh"
            )
    runs.gather([])  # all have read it
    write(path, settings, run)


WRITTEN = re.compile(
    r"(candidates|scores|pairs|eft|metrics)\.jsonl(\.ref\.pt)?|(done|config|stage|run)\.json|"
    r"last(\.previous)?\.pt|"
    r"best\.\w+|(metrics|rewards)\.png|(rwkv|lora|state)-(\d+|final)\.\w+|tokenizer\.\w+|vocab\.txt"
)


def clear(out, run):
    """--fresh: delete what stages wrote; other files stay, and their folders."""
    if run.main:
        for folder in [path.parent for path in out.glob("[0-9][0-9]-*/stage.json")]:
            for file in folder.iterdir():
                if WRITTEN.fullmatch(file.name):
                    file.unlink()
            with contextlib.suppress(OSError):  # not empty
                folder.rmdir()
    runs.gather([])


# ----------------------------------------------------------------------------------------------
# stages: cfg has the stage's settings, and in init_from and judge_model what the stages before
# left; each returns what it changes of these, and a "report"


def call(cfg, function, *args):
    """A function of the config file; UserError names it, and what it was given."""
    given = ", ".join(f"{a!r:.60}" for a in args if isinstance(a, (str, int, float, list)))
    what = f"{show(function)}({given}) of the config"
    return user_code.call(what, function, cfg.reward_seconds, *args)


def load(path, cfg, run):
    """Weights, a LoRA or a state -> (model, tokenizer), the recorded one where there is one."""
    if not path:
        raise UserError("which model? --init_from=FILE, the .pth or .safetensors to start from")
    is_recorded = (Path(path).parent / "config.json").is_file()
    tokenizer = "" if is_recorded else cfg.tokenizer
    return engine.load(path, run.device, run.dtype, tokenizer, cfg.another_base)[:2]


def load_judge(cfg, run):
    """cfg.judge_model, or the current model, as a judge."""
    path = cfg.judge_model or cfg.init_from
    model, tokenizer = load(path, cfg, run)
    if cfg.judge == "head" and model.score is None:
        raise UserError(
            f"judge=head, but {path} has no score.weight; train_judge or train_reward.py makes one"
        )
    return Judge(cfg, model, tokenizer)


def train(script, cfg, stage, folder, keep_adapter=True, **settings):
    """script.main in the stage's folder, new or on from last.pt -> the file that it made.

    It starts from cfg.init_from. If that is a LoRA or a state, it is trained further, or with
    keep_adapter=False its base is begun from.
    """
    _, about = load_model(cfg.init_from, another_base=cfg.another_base)
    settings = {
        **{key: getattr(cfg, key) for key in SHARED},
        **stage,
        **settings,
        "out_dir": str(folder),
        "init_from": base_of(cfg.init_from, about) if about else cfg.init_from,
        "resume": (folder / "last.pt").exists(),
    }
    if about and keep_adapter:
        settings["adapter"] = cfg.init_from
    fields = {f.name for f in dataclasses.fields(script.Config)}
    script.main(script.Config(**{key: v for key, v in settings.items() if key in fields}))
    runs.gather([])  # rank 0 has written it
    made = [file for file in folder.glob("*-final.*") if file.suffix in (".pth", ".safetensors")]
    return str(made[0])


def candidates(cfg, folder, run, replies=""):
    """Answers to this round's prompts, through candidates.jsonl -> (the prompts' rows, answers)

    The prompts are cfg.prompts, or those of the conversations `replies`.
    """
    model, tokenizer = load(cfg.init_from, cfg, run)
    if replies:
        prompts = read_replies(replies, tokenizer, cfg.skip_bad)
    else:
        prompts = read_prompts(cfg.prompts, tokenizer, unique=True, skip_bad=cfg.skip_bad)
    prompts = prompts[cfg.first_prompt :][: cfg.max_prompts]
    if not prompts:
        raise UserError(
            f"no prompts from number {cfg.first_prompt}: first_prompt is beyond the file's end"
        )
    n = cfg.num_candidates

    def make(i, j):
        completions = engine.generate(
            model,
            [prompt_ids for prompt_ids, _ in prompts[i // n : j // n]],
            n=n,
            max_new_tokens=cfg.max_completion_length,
            temperature=cfg.temperature,
            top_p=cfg.top_p,
            stop=cfg.stop,
            tokenizer=tokenizer,
            seed=cfg.seed,
            indices=range(i // n, j // n),
            progress=False,
        )
        return [
            {
                "number": k // n,
                "candidate": k % n,
                "prompt": prompts[k // n][1]["prompt"],
                "text": completion.text,
                "tokens": len(completion.tokens),
                "finish_reason": completion.finish_reason,
                **({"ids": completion.tokens} if cfg.reward else {}),
            }
            for k, completion in enumerate(completions, i)
        ]

    path, total = folder / "candidates.jsonl", len(prompts) * n
    answers = append_blocks(path, total, cfg.block * n, make, run, schemas.Candidate)
    check_numbers(path, answers, n, [row["prompt"] for _, row in prompts])
    return [row for _, row in prompts], answers


def judgements(cfg, folder, rows, answers, judge, run):
    """A score for each answer, through scores.jsonl. judge: a Judge, or a reward function."""
    path = folder / "scores.jsonl"

    def make(i, j):
        prompts = [answer["prompt"] for answer in answers[i:j]]
        texts = [answer["text"] for answer in answers[i:j]]
        if isinstance(judge, Judge):
            judged = judge(prompts, texts, range(i, j))
        else:
            columns = columns_of([rows[answer["number"]] for answer in answers[i:j]])
            if all("ids" in answer for answer in answers[i:j]):  # an older file has none
                columns["completion_ids"] = [answer["ids"] for answer in answers[i:j]]
            scores = call_reward(judge, prompts, texts, columns, cfg.reward_seconds)
            judged = [{"score": score, "parsed": int(score is not None)} for score in scores]
        return [
            {"number": answer["number"], "candidate": answer["candidate"], **judgement}
            for answer, judgement in zip(answers[i:j], judged, strict=True)
        ]

    def stop_if_none(judged):
        if any(row["score"] is not None for row in judged):
            return
        texts = [repr(row["said"][0][-120:]) for row in judged[:3] if "said" in row]
        judge_said = "; the judge said " + "; ".join(texts) if texts else ""
        raise UserError(
            f"no valid score in {len(judged)} judgements, which {path} has{judge_said}. Change "
            "template, score_pattern or judge, delete that file and stage.json, run again"
        )

    n_lines = cfg.block * cfg.num_candidates
    kind = schemas.Judgement
    judged = append_blocks(path, len(answers), n_lines, make, run, kind, stop_if_none)
    check_numbers(path, judged, cfg.num_candidates)
    return judged


def labels_of(cfg, answers):
    """-> [P][N] what cfg.check says of the answers."""
    labels = [float(call(cfg, cfg.check, answer["prompt"], answer["text"])) for answer in answers]
    return runs.chunks(labels, cfg.num_candidates)


def judged_round(stage, cfg, folder, run):
    """self_reward, external_reward: answers, scores, best against worst, DPO."""
    rows, answers = candidates(cfg, folder, run)
    judge = cfg.reward if stage["kind"] == "external_reward" else None
    judged = judgements(cfg, folder, rows, answers, judge or load_judge(cfg, run), run)
    texts = runs.chunks([answer["text"] for answer in answers], cfg.num_candidates)
    scores = runs.chunks([row["score"] for row in judged], cfg.num_candidates)
    report = {
        "candidate_tokens": mean([answer["tokens"] for answer in answers]),
        "score": mean([row["score"] for row in judged if row["score"] is not None]),
        "parse_rate": mean([row["parsed"] for row in judged]),
    }
    if cfg.check:
        report.update(judge_metrics(scores, labels_of(cfg, answers)))

    pairs, dropped = [], Counter()
    for row, prompt_texts, prompt_scores in zip(rows, texts, scores, strict=True):
        pair, why_none = make_pair(row, prompt_texts, prompt_scores, cfg)
        if pair:
            pairs.append(pair)
        else:
            dropped[why_none] += 1
    return train_on_pairs(pairs, dropped, report, stage, cfg, folder, run)


def spin_round(stage, cfg, folder, run):
    """spin: an answer to each conversation's prompt, the data's own reply against it, DPO."""
    rows, answers = candidates(cfg, folder, run, replies=stage["data"])
    pairs = []
    for row, answer in zip(rows, answers, strict=True):
        if answer["text"].strip() not in ("", row["chosen"].strip()):
            pairs.append({**row, "rejected": answer["text"]})
    dropped = {"empty or equal": len(rows) - len(pairs)}
    report = {"candidate_tokens": mean([answer["tokens"] for answer in answers])}
    return train_on_pairs(pairs, dropped, report, stage, cfg, folder, run)


def train_on_pairs(pairs, dropped, report, stage, cfg, folder, run):
    """pairs.jsonl, and DPO on it -> what a round hands on."""
    n_prompts, dropped = len(pairs) + sum(dropped.values()), dict(dropped)
    print0(f"{folder}: {len(pairs)} pairs of {n_prompts} prompts; dropped: {dropped}")
    if not pairs:
        raise UserError(
            f"{folder}: no pairs of {n_prompts} prompts, {dropped}; its candidates and scores "
            "tell why"
        )
    write(folder / "pairs.jsonl", pairs, run)
    weights = train(train_dpo, cfg, stage, folder, data=str(folder / "pairs.jsonl"))
    return {"init_from": weights, "report": {**report, "pairs": len(pairs), "dropped": dropped}}


def judge_stage(stage, cfg, folder, run):
    """train_judge: own answers, labelled and balanced, train a judge; a tenth is held out."""
    rows, answers = candidates(cfg, folder, run)
    labels = labels_of(cfg, answers)
    texts = runs.chunks([answer["text"] for answer in answers], cfg.num_candidates)
    cut = round(len(rows) * 0.9)
    eft = make_eft(rows[:cut], texts[:cut], labels[:cut], cfg)
    if not eft:
        raise UserError(
            f"{folder}: no prompt has answers of different labels; take more candidates or a "
            "higher temperature"
        )
    write(folder / "eft.jsonl", eft, run)
    tune = stage.get("tune", "lora")
    script = train_state if tune == "state" else train_sft
    if cfg.judge == "head":
        script = train_reward
    data = str(folder / "eft.jsonl")
    file = train(script, cfg, stage, folder, keep_adapter=False, data=data, tune=tune)

    judge, scores = load_judge(dataclasses.replace(cfg, judge_model=file), run), []
    for p, (row, prompt_texts) in enumerate(zip(rows[cut:], texts[cut:], strict=True)):
        numbers = range(1000 * p, 1000 * p + len(prompt_texts))
        judged = judge([row["prompt"]] * len(prompt_texts), prompt_texts, numbers)
        scores.append([judgement["score"] for judgement in judged])
    metrics = judge_metrics(scores, labels[cut:])
    measured = ", ".join(f"{name} {cell(value) or '-'}" for name, value in metrics.items())
    print0(f"{file}, {len(rows) - cut} held-out prompts: {measured}")
    return {"judge_model": file, "report": {"pairs": len(eft), **metrics}}


def measure(cfg, weights, run):
    """Of a model that a stage made -> {"eval": numbers, "value": the one that counts, "tokens": of
    an answer, "kl": to the start, nats an answer}; the last two by sampling."""
    (model, tokenizer), measured = load(weights, cfg, run), {}
    if cfg.eval_fn:
        measured["eval"] = runs.call_eval_fn(cfg, model, tokenizer)
        measured.update(("value", value) for value in list(measured["eval"].values())[:1])
    elif cfg.eval_data:
        plain = train_sft.Config()
        documents = read_examples(cfg.eval_data, tokenizer, plain.ctx_len, skip_bad=cfg.skip_bad)
        measured["eval"] = evaluate(model, documents, plain, run)
        measured["value"] = -measured["eval"]["val_loss"]
    if cfg.prompts:
        rows = read_prompts(cfg.prompts, tokenizer, skip_bad=cfg.skip_bad)[:64]
        prompts = [prompt_ids for prompt_ids, _ in rows]
        completions = engine.generate(
            model,
            prompts,
            max_new_tokens=cfg.max_completion_length,
            stop=cfg.stop,
            tokenizer=tokenizer,
            seed=cfg.seed,
            progress=False,
        )
        start, _ = load(cfg.init_from, cfg, run)
        start_logps = score_choices(start, prompts, [[c.tokens] for c in completions])
        gaps = [sum(c.logprobs) - logp for c, (logp,) in zip(completions, start_logps, strict=True)]
        measured["kl"] = mean(gaps)
        measured["tokens"] = mean([len(c.tokens) for c in completions])
    return runs.gather([measured] if run.main else [])[0]


# ----------------------------------------------------------------------------------------------
# the report

INTRO = (
    "Evaluation, answer tokens and KL (nats an answer) are of the model that the stage left; "
    "score, judge and pairs are of the answers that it was trained on."
)
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
    """A number as the report shows it."""
    if value is None:
        return ""
    return f"{value:.3f}" if isinstance(value, float) else str(value)


def write_report(out, history):
    """report.md and report.png, from every stage's done.json and pairs.jsonl."""
    rows = [{**done.get("report", {}), **done} for done in history]
    lines = [INTRO, "", f"| stage | {' | '.join(COLUMNS)} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in rows:
        name = row["stage"] + (" (undone)" if "undone" in row else "")
        cells = [cell(row.get(key)) for key in COLUMNS.values()]
        lines.append(f"| {' | '.join([name, *cells])} |")
    lines += ["", "![score and length](report.png)"]
    for row in rows:
        if "dropped" in row:
            lines += ["", f"## {row['stage']}: dropped {row['dropped'] or 'none'}"]
        path = out / row["stage"] / "pairs.jsonl"
        if path.exists():
            for where, pair in itertools.islice(read_jsonl(path, "pairs"), 12):
                lines += ["", *describe_pair(files.checked(pair, schemas.Pair, where))]
    with files.atomic_write(out / "report.md") as tmp:
        tmp.write_text("\n".join(lines) + "\n", encoding="utf-8")
    plot_report(out / "report.png", rows)


def describe_pair(pair):
    """A row of pairs.jsonl -> lines of Markdown."""
    prompt = pair["prompt"]
    if isinstance(prompt, list):
        prompt = str(prompt[-1].get("content", prompt[-1].get("value")))
    texts, lines = {"prompt": prompt, **{n: pair[n] for n in ("chosen", "rejected")}}, []
    for name, text in texts.items():
        score = cell(pair.get(f"{name}_score"))
        title = f"{name} {score}" if score else name
        lines.append(f"    {title}: " + text.strip()[:1000].replace("\n", "\n    "))
    return lines


def plot_report(path, rows):
    """Score and evaluation on the left axis, answer tokens on the right one, over the stages."""
    with files.figure(path) as left:
        right = left.twinx()
        series = (
            (left, "score", "score", "C0.-"),
            (left, "value", "evaluation", "C2.-"),
            (right, "tokens", "answer tokens", "C1.--"),
        )
        for axes, key, label, style in series:
            points = [(i, row[key]) for i, row in enumerate(rows) if row.get(key) is not None]
            if points:
                axes.plot(*zip(*points, strict=True), style, label=label)
        left.set(xticks=range(len(rows)), ylabel="score, evaluation")
        left.set_xticklabels([row["stage"] for row in rows], rotation=15, fontsize=7)
        right.set_ylabel("tokens")
        if left.lines or right.lines:
            left.figure.legend(fontsize=7)


# ----------------------------------------------------------------------------------------------


def did_you_mean(name, names):
    """-> a hint at the nearest of `names`, or nothing."""
    near = difflib.get_close_matches(str(name), names, 1)
    return f"; did you mean {near[0]!r}?" if near else ""


def chosen_stages(cfg):
    """-> the list of stages; UserError, before anything runs, for what cannot run."""
    stages = cfg.stages
    if isinstance(stages, dict):
        if cfg.recipe and cfg.recipe not in stages:
            raise UserError(f"recipe={cfg.recipe}: the config has {', '.join(stages)}")
        stages = stages[cfg.recipe or next(iter(stages))]
    if not stages:
        raise UserError(
            "no stages; give a config file with stages = [sft(...), self_reward(...), …]"
        )
    for number, stage in enumerate(stages, 1):
        kind = stage.get("kind") if isinstance(stage, dict) else stage
        if not isinstance(stage, dict) or kind not in SCRIPTS:
            raise UserError(
                f"stage {number}: there is no stage {kind!r}{did_you_mean(kind, SCRIPTS)} "
                f"There are {', '.join(SCRIPTS)}"
            )
        try:
            check_stage(stage, stage_config(cfg, stage, number))
        except UserError as e:
            raise UserError(f"stage {number}, {kind}: {e}") from None
    return stages


def stage_config(cfg, stage, number):
    """Config with the stage's own settings in it, and another seed for each stage."""
    fields = {f.name for f in dataclasses.fields(Config)}
    settings = {"seed": cfg.seed + 1000 * number}
    settings.update((key, value) for key, value in stage.items() if key in fields)
    if stage["kind"] == "spin":
        settings["num_candidates"] = 1
    if stage["kind"] == "external_reward":
        settings["judge"] = "head"  # scores what has no reward function
    return dataclasses.replace(cfg, **settings)


def check_stage(stage, cfg):
    """UserError for a setting that the stage does not have, or that it lacks."""
    kind = stage["kind"]
    known = {f.name for script in SCRIPTS[kind] for f in dataclasses.fields(script.Config)}
    known |= {f.name for f in dataclasses.fields(Config)} - set(FREE) | {"kind"}
    known -= {"out_dir", "init_from", "resume", "eval_fn", "eval_seconds"}
    for key in stage:
        if key not in known:
            raise UserError(f"{key!r} is none of its settings{did_you_mean(key, known)}")
    if kind in ("sft", "dpo", "spin") and not stage.get("data"):
        raise UserError("it needs data")
    if kind == "train_judge" and not cfg.check:
        raise UserError("it needs check in the config file")
    config.check(cfg)
    if kind in ("self_reward", "train_judge") and cfg.judge != "head":
        rubric(cfg)


def main(cfg):
    with runs.processes(cfg) as run:
        stages, out = chosen_stages(cfg), Path(cfg.out_dir)
        if run.main:
            out.mkdir(parents=True, exist_ok=True)
            run.held.enter_context(files.locked(out))
        if cfg.fresh:
            clear(out, run)
        current = {"init_from": cfg.init_from, "judge_model": cfg.judge_model}
        history = []  # what every stage left, as in its done.json
        for number, stage in enumerate([{"kind": "start"}, *stages]):
            # ---- the stage's folder and settings
            kind = stage["kind"]
            folder = out / f"{number:02d}-{kind}"
            own_cfg = stage_config(dataclasses.replace(cfg, **current), stage, number)
            claim(folder, {**vars(own_cfg), **stage}, run)
            settings = [f"{key}={show(value)}" for key, value in stage.items() if key != "kind"]
            print0(f"{folder}: " + ", ".join(settings))

            # ---- run and measure it, or undo it
            done_path = folder / "done.json"
            if done_path.exists():
                print0(f"{folder} is complete")
                done = files.read_json(done_path, schemas.Done)
            else:
                if kind == "start":
                    done = {"init_from": cfg.init_from}
                elif kind in ("sft", "dpo"):
                    done = {"init_from": train(SCRIPTS[kind][0], own_cfg, stage, folder)}
                elif kind == "spin":
                    done = spin_round(stage, own_cfg, folder, run)
                elif kind == "train_judge":
                    done = judge_stage(stage, own_cfg, folder, run)
                else:
                    done = judged_round(stage, own_cfg, folder, run)
                done["stage"] = folder.name
                if "init_from" in done:
                    done.update(measure(cfg, done["init_from"], run))
                measured = [before for before in history if "value" in before]
                best = max(measured, key=lambda before: before["value"], default=None)
                limit = -math.inf
                if best and cfg.max_drop is not None:
                    limit = best["value"] - cfg.max_drop
                if done.get("value", math.inf) < limit:
                    print0(
                        f"{folder} is undone: {done['value']:.4f} after {best['value']:.4f}; "
                        f"the run goes on from {best['stage']}"
                    )
                    done.update(undone=done["init_from"], init_from=best["init_from"])
                write(done_path, done, run)

            # ---- hand on, report
            current.update((key, done[key]) for key in current if key in done)
            history.append(done)
            if run.main:
                write_report(out, history)
        print0(f"done: {current['init_from']}; {out / 'report.md'}")


if __name__ == "__main__":
    main(load_config(Config))
