"""A model as a judge of answers: the text that it reads, the score that it gives, how it learns."""

import itertools
import math
import os
import random
import re
import statistics

from gosling import engine
from gosling.answers import score_choices
from gosling.batch import score_answers
from gosling.config import UserError
from gosling.data import render_answer
from gosling.runs import chunks

import torch

SCORE = re.compile(
    r"""
    (?<! max\ ) (?<! maximum\ ) (?<! possible\ )   # "Max score: 5" is none
    (?: (?P<word> (?<![a-z]) (?: score | rating | 评分 | 得分 | 分数 ) s?
          # up to a colon, perhaps with a bracket: "Score (out of 5):"; or "score is", "score of"
          (?: [^\n\d:：﹕︓=(]{0,40} (?:\([^)\n]{0,40}\))? [^\n\d:：﹕︓=]{0,40} [:：﹕︓=]
            | \s+ (?:is|of) \b
          )?
        )
      | (?P<box> \\boxed\{ )
      | ^                                            # without the word: a line of its own
      | (?<![a-z]) (?: overall | points? | grade | mark ) [*_\ ]{0,4} [:：﹕︓=]   # or its end
    )
    (?: [^\w+\-−] | _ | -\s ){0,20}                  # bold, brackets, blanks; no sign
    (?P<number> [+\-−]? \d+ (?:[.,]\d+)? )
    (?! \d | [.,]\d | e\d | % | \s*[-–~]\s*\d )      # no percentage and no range
    (?: \W{0,4} (?: [/／] | \b(?:out\ )?of\b ) \W{0,4} (?P<scale> \d+ ) )?
    (?(word) | (?(box) \s*\} | [^\w\n]{0,20}$ ) )
    """,
    re.I | re.M | re.X,
)
# "I would rate this 4 out of 5.", but not "3 out of 5 facts are right"
IN_PROSE = re.compile(
    r"""
    (?<! [\w.,/+\-−] ) (?P<number> \d+ (?:[.,]\d+)? ) (?: \s (?:stars|points) \b )?
    \s{0,3} (?: [/／] | out\ of ) \s{0,3} (?P<scale> \d+ )
    (?: \s (?:stars|points) \b )?
    (?= \s*$ | [^\w\s/%] | \s (?:because|since|as|for|overall|in\ total) \b )
    """,
    re.I | re.M | re.X,
)


def parse_score(text, low=0, high=5, pattern=""):
    """The last score in a judge's text -> float, or None. Never an exception, whatever the text.

    "Score: 3.5", "**Score:** 4/5", "评分：4", "Overall: 4/5", "\\boxed{4}", or a number alone on
    its line; without any of these "I rate this 4 out of 5". None without one, out of range, or of
    another scale ("4/10"). pattern: a regular expression whose group 1 is the score.
    """
    if not isinstance(text, str):
        return None
    matches = list(re.finditer(pattern or SCORE, text))
    if not matches and not pattern:
        matches = list(IN_PROSE.finditer(text))
    if not matches:
        return None
    try:
        number, scale = (matches[-1][1], None) if pattern else matches[-1].group("number", "scale")
        value = float(number.replace(",", ".").replace("−", "-"))
    except (IndexError, AttributeError, ValueError):  # the pattern's group is absent or no number
        return None
    if not low <= value <= high or (scale is not None and float(scale) != high):
        return None
    return value


def render(cfg, prompt, response):
    """The text that the judge reads. Blank lines, which would end its turn, go.

    prompt: text, or messages; several are shown with their roles.
    """
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]["content"]
    elif isinstance(prompt, list):
        prompt = "\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in prompt)
    fields = {
        "prompt": re.sub(r"\n{2,}", "\n", prompt.strip()),
        "response": re.sub(r"\n{2,}", "\n", response.strip()),
    }
    if "{{" not in cfg.judge_template and "{%" not in cfg.judge_template:
        return cfg.judge_template.format(**fields)
    import jinja2

    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, keep_trailing_newline=True)
    return environment.from_string(cfg.judge_template).render(fields)


def check_scores(cfg):
    """UserError for a range that holds no score, and for choices that are no texts with numbers."""
    low, high = cfg.score_range
    if not low < high:
        raise UserError(f"score_range={cfg.score_range}: expected the lowest, then the highest")
    for text, value in cfg.judge_choices.items():
        is_number = isinstance(value, (int, float)) and math.isfinite(value)
        if not isinstance(text, str) or not text or not is_number:
            raise UserError(f"judge_choices: {text!r} is {value!r}; expected a text and its number")
    if len(cfg.judge_choices) < 2:
        raise UserError("judge_choices: expected two or more, such as {' 1': 1, ' 5': 5}")


def rubric(cfg):
    """What every text of the judge begins with: the template up to its first field."""
    check_scores(cfg)
    try:
        re.compile(cfg.score_pattern)
        texts = [render(cfg, "<prompt>", "<response>"), render(cfg, "[prompt]", "[response]")]
    except Exception as e:
        raise UserError(
            f"judge_template or score_pattern: {type(e).__name__}: {e}; "
            "fields: {prompt}, {response}"
        ) from None
    for name in ("prompt", "response"):
        if f"<{name}>" not in texts[0]:
            raise UserError(
                f"judge_template has no {{{name}}}; it needs {{prompt}} and {{response}}"
            )
    return os.path.commonprefix(texts).rstrip(" ")  # a blank is tokenised with the word behind it


class Judge:
    """A model in eval mode that has read the rubric once; every answer goes on from a copy of that
    state. cfg: the fields judge… and score… of self_reward.py, and seed, stop and top_p."""

    def __init__(self, cfg, model, tokenizer):
        self.cfg, self.model, self.tokenizer = cfg, model, tokenizer
        self.rubric = "" if cfg.judge == "head" else rubric(cfg)
        rubric_ids = tokenizer.encode(self.rubric)
        self.state = engine.prefill(model, [rubric_ids])[1] if rubric_ids else None

    def __call__(self, prompts, texts, numbers):
        """-> a row {"score", "parsed", …} for each answer; parsed: share of scores that were read.

        numbers: those of the answers in the stage, for their random streams.
        """
        if self.cfg.judge == "head":
            return self.read_head(prompts, texts)
        if self.cfg.judge == "expected":
            return self.expect(prompts, texts)
        return self.sample(prompts, texts, numbers)

    @torch.no_grad()
    def read_head(self, prompts, texts):
        """The scalar head's score; None of an empty answer."""
        groups, numbers = [], []  # neighbours with one prompt are a group: the prompt runs once
        for i, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
            if not text.strip():
                continue
            prompt_ids, answer_ids = render_answer(prompt, text, self.tokenizer)
            if not groups or groups[-1][0] != prompt_ids:
                groups.append((prompt_ids, []))
            groups[-1][1].append(answer_ids)
            numbers.append(i)
        scores = [None] * len(texts)
        if groups:
            by_group = score_answers(self.model, groups, self.model.emb.weight.device)
            for i, score in zip(numbers, torch.cat(by_group).tolist(), strict=True):
                scores[i] = score
        return [{"score": score, "parsed": 1} for score in scores]

    def expect(self, prompts, texts):
        """The mean of the choices' values under their probabilities, scaled to add to 1.

        A choice that another one begins with (" 1" of " 10") counts where the text ends there.
        """
        choices = [self.tokenizer.encode(choice) for choice in self.cfg.judge_choices]
        values = torch.tensor(list(self.cfg.judge_choices.values()), dtype=torch.float64)
        prompt_ids = self.encode(prompts, texts, self.cfg.judge_cue)
        every = [choices] * len(texts)
        logps = score_choices(self.model, prompt_ids, every, state=self.state)
        p = torch.tensor(logps, dtype=torch.float64).softmax(-1)  # [answers, choices]
        p = without_longer(p, choices)
        return [{"score": score, "parsed": 1} for score in (p @ values / p.sum(-1)).tolist()]

    def sample(self, prompts, texts, numbers):
        """The mean of the scores that it writes; None if no judgement has one."""
        cfg, rows = self.cfg, []
        judgements = engine.generate(
            self.model,
            self.encode(prompts, texts),
            n=cfg.judge_samples,
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
        for of_answer in chunks([c.text for c in judgements], cfg.judge_samples):
            parsed = [parse_score(text, *cfg.score_range, cfg.score_pattern) for text in of_answer]
            scores = [score for score in parsed if score is not None]
            score = statistics.fmean(scores) if scores else None
            rows.append({"score": score, "parsed": len(scores) / len(parsed), "said": of_answer})
        return rows

    def encode(self, prompts, texts, cue=""):
        """The judge's texts behind the rubric -> ids; they are tokenised apart, as it was read."""
        encoded = []
        for prompt, text in zip(prompts, texts, strict=True):
            whole = render(self.cfg, prompt, text) + cue
            if not whole.startswith(self.rubric):
                raise UserError(
                    "judge_template begins differently from answer to answer; "
                    "keep conditions behind the rubric"
                )
            encoded.append(self.tokenizer.encode(whole[len(self.rubric) :]))
        return encoded


def without_longer(p, choices):
    """p [answers, choices], how likely a text begins with each choice's tokens -> how likely it is
    that choice and none that goes on from it: " 1" and not " 10"."""
    p = p.clone()
    by_length = sorted(range(len(choices)), key=lambda i: len(choices[i]), reverse=True)
    for place, i in enumerate(by_length):
        for j in by_length[:place]:
            if choices[j][: len(choices[i])] == choices[i] != choices[j]:
                p[:, i] -= p[:, j]
    return p.clamp(min=0)


# ----------------------------------------------------------------------------------------------
# rows that train a judge


def make_eft(rows, texts, labels, cfg):
    """Prompt rows [P], answers and labels [P][N] -> judge rows; for judge="head" pairs.

    Of every prompt as many answers of one label as of another, or the judge learns which prompts
    are hard instead of which answers are good.
    """
    rng, judge_rows = random.Random(cfg.seed), []
    for row, prompt_texts, prompt_labels in zip(rows, texts, labels, strict=True):
        by_label = {}
        for text, label in dict(zip(prompt_texts, prompt_labels, strict=True)).items():
            if text.strip():
                by_label.setdefault(float(label), []).append(text)
        if len(by_label) < 2:
            continue
        n = min(len(of_label) for of_label in by_label.values())
        picked = []
        for label in sorted(by_label, reverse=True):
            picked += [(text, label) for text in rng.sample(by_label[label], n)]
        if cfg.judge != "head":
            judge_rows += [judge_row(row["prompt"], text, label, cfg) for text, label in picked]
            continue
        for (chosen, high), (rejected, low) in itertools.product(picked, picked):
            if high > low:
                judge_rows.append({"prompt": row["prompt"], "chosen": chosen, "rejected": rejected})
    return judge_rows


def judge_row(prompt, response, label, cfg):
    """The judge's text and, as its completion, the score text whose value is nearest the label."""
    score = min(cfg.judge_choices, key=lambda choice: abs(cfg.judge_choices[choice] - label))
    text = render(cfg, prompt, response)
    if cfg.judge == "expected":
        return {"prompt": text + cfg.judge_cue, "completion": score}
    return {"prompt": text, "completion": cfg.judge_cue + score}
