"""self_reward.py: scores, pairs and judge rows by hand, a scripted judge, stages that restart, runs
on several processes."""

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import self_reward
import train_dpo
import train_sft
from gosling import engine, schemas
from gosling.config import UserError, load_config
from gosling.judge import Judge, make_eft, render, rubric
from gosling.runs import Run
from gosling.tokenizer import load_tokenizer
from gosling.tune import load_model
from gosling.weights import fingerprint
from model import RWKV, RWKVConfig
from self_reward import Config, choose_pair, judge_metrics, parse_score

import numpy as np
import pytest
import torch
from helpers import ROOT, write

BYTES = load_tokenizer("bytes")
RUN = Run(0, 1, torch.device("cpu"), torch.float32)

# ----------------------------------------------------------------------------------------------
# scores, pairs, judge rows

OUTPUTS = [
    ("Score: 4", 4),
    ("score: 3.5", 3.5),
    ("SCORE:4", 4),
    ("Score: 0", 0),
    ("Score: 5.0", 5),
    ("Score: +4", 4),
    ("Score 3", 3),
    ("Score: 4.", 4),
    ("**Score:** 4", 4),
    ("Score: **4**", 4),
    ("**Score: 4**", 4),
    ("*Score*: _4_", 4),
    ("### Score: 4\n", 4),
    ("- Score: 4", 4),
    ("| Score | 4 |", 4),
    ("Score: 4/5", 4),
    ("Score: 4 / 5", 4),
    ("Score: **4**/5", 4),
    ("Score: 4 out of 5", 4),
    ("Score: 3 of 5", 3),
    ("4/5", 4),
    ("4", 4),
    ("**4**", 4),
    ("Score (out of 5): 4", 4),
    ("Total score: 4", 4),
    ("Final Score — 4", 4),
    ("Score - 4", 4),
    ("Score = 4", 4),
    ("the score is 4", 4),
    ("a score of 4 points", 4),
    ("Score: <4>", 4),
    ("Score: [4]", 4),
    ("Score: `4`", 4),
    ("Score:\n4", 4),
    ("Score:\n\n**4**", 4),
    ("Score: 4 (very good)", 4),
    ("Score: 4, because", 4),
    ("Score：4", 4),
    ("Score﹕3", 3),
    ("Score : 4", 4),
    ("Score\u00a0: 4", 4),
    ("评分：4", 4),
    ("评分：4分", 4),
    ("得分: 3.5", 3.5),
    ("Score: ４", 4),
    ("Score: 3,5", 3.5),
    ("Score: 4⭐", 4),
    ("Score: 4\n\nUser: thanks", 4),
    ("Score: 4\nThat is because of 3 things.", 4),
    ("Score: 2\nOn second thoughts\nScore: 5", 5),
    ("Score: 5\nScore: 2", 2),
    ("It makes 3 points and has 4 faults.\nScore: 2", 2),
    ("Score: 2/5\nScore: 5/5", 5),
    ("Score: 7", None),
    ("Score: 10", None),
    ("Score: 5.1", None),
    ("Score: -1", None),
    ("Score: −1", None),
    ("Score: 4/10", None),
    ("Score: 8/10", None),
    ("Score: 4 out of 10", None),
    ("Score: 80%", None),
    ("Score: 3-4", None),
    ("Score: 4.5.1", None),
    ("Score: 1e3", None),
    ("Score: 2\nScore: 9", None),
    ("Score: four", None),
    ("Score: ", None),
    ("Score: nan", None),
    ("Score: inf", None),
    ("Score: " + "9" * 400, None),
    ("It has 3 points", None),
    ("underscore 3", None),
    ("no idea", None),
    ("", None),
    ("\n\n", None),
    ("Score: ((((", None),
    (None, None),
    (4, None),
]


@pytest.mark.parametrize("text, score", OUTPUTS)
def test_parse_score_on_a_table_of_judge_outputs(text, score):
    assert parse_score(text) == score


def test_parse_score_in_a_range_or_by_a_pattern():
    assert parse_score("Score: 7", 0, 10) == 7
    assert parse_score("Score: 7/10", 0, 10) == 7
    assert parse_score("Score: 1", 2, 10) is None
    assert parse_score("grade <3> then <4>", pattern=r"<(\d)>") == 4
    assert parse_score("grade <x>", pattern="<(.)>") is None
    assert parse_score("a Score: 4", pattern="Score") is None  # a pattern without a group


def test_parse_score_neither_raises_nor_hangs():
    start = time.process_time()
    for piece in ("score ", "score (", "score: ", "\n", "* ", "- ", "1", "score:\n"):
        parse_score(piece * 2000)
    assert time.process_time() - start < 2
    rng = random.Random(0)
    for _ in range(2000):
        parse_score("".join(rng.choices("score: 0123456789./-*\n（：٣②", k=rng.randint(0, 30))))


def test_choose_pair_takes_the_first_of_the_best_and_of_the_worst():
    assert choose_pair([2, 5, None, 1, 5, 1]) == (1, 3)
    assert choose_pair([None, 0.5, 0]) == (1, 2)
    for scores in ([3, 3, 3], [3, None], [None, None], []):
        assert choose_pair(scores) is None


def test_judge_metrics_by_hand():
    # Prompt 1: the pairs 0 > 1 and 2 > 1 are right, 0 > 2 is wrong (labels 3 1 2, scores 4 0 5);
    # rho of the ranks (2, 1, 3) and (3, 1, 2) is 1 - 6 * 2 / 24. Prompt 2: equal labels.
    # Prompt 3: a tie is wrong, its rho is 0, and it gives no pair.
    scores = [[4, 0, 5], [1, 2, None], [1, 1, None]]
    labels = [[3, 1, 2], [1, 1, 0], [1, 0, 1]]
    assert judge_metrics(scores, labels) == {
        "agreement": 2 / 4,
        "spearman": pytest.approx((1 - 6 * 2 / 24 + 0) / 2),
        "best_vs_worst": 1 / 2,
    }
    none = {"agreement": None, "spearman": None, "best_vs_worst": None}
    assert judge_metrics([[None, 1]], [[0, 1]]) == none


def test_judge_rows_are_balanced_within_every_prompt():
    rows = [{"prompt": f"p{i}"} for i in range(4)]
    texts = [["a", "b", "c", "a", " "], ["d", "e"], ["f", "g", "h"], ["i"]]
    labels = [[1, 0, 0, 1, 0], [0, 0], [5, 3, 3], [1]]
    cfg = Config(judge_template="{prompt} {response}", judge="expected", judge_cue=" S:")
    expected = make_eft(rows, texts, labels, cfg)
    found = [(row["prompt"][:2], row["completion"]) for row in expected]
    assert found == [("p0", " 1"), ("p0", " 0"), ("p2", " 5"), ("p2", " 3")]
    assert expected[0]["prompt"] == "p0 a S:"
    assert expected[1]["prompt"] in ("p0 b S:", "p0 c S:")
    assert expected[2]["prompt"] == "p2 f S:"
    sampled = make_eft(rows, texts, labels, dataclasses.replace(cfg, judge="sample"))
    assert sampled[0] == {"prompt": "p0 a", "completion": " S: 1"}
    heads = make_eft(rows, texts, labels, dataclasses.replace(cfg, judge="head"))
    assert [(row["prompt"], row["chosen"]) for row in heads] == [("p0", "a"), ("p2", "f")]
    assert all(row["rejected"] in "bcgh" for row in heads)


# ----------------------------------------------------------------------------------------------
# runs


def chat(text):
    return [{"role": "user", "content": text}]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that answers one or two letters, and stops: whole runs take a second."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = RWKV(RWKVConfig("x070", 2, 64, 257))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    model.save_pretrained(folder / "raw.pth")
    words = ["ab", "ba", "aa", "b", "a", "bb"]
    replies = [{"role": "assistant", "content": words[i * 7 % 6]} for i in range(48)]
    chats = [{"messages": [*chat(f"say {i}"), reply]} for i, reply in enumerate(replies)]
    write(folder / "sft.jsonl", *chats)
    write(
        folder / "prompts.jsonl", *[{"prompt": chat(f"tell {i}"), "column": i} for i in range(20)]
    )
    cfg = train_sft.Config(
        data=str(folder / "sft.jsonl"),
        init_from=str(folder / "raw.pth"),
        tokenizer="bytes",
        out_dir=str(folder / "sft"),
        lr=1e-2,
        lr_final=1e-3,
        micro_bsz=16,
        global_bsz=16,
        max_steps=60,
        eval_every=0,
        log_every=100,
        device="cpu",
    )
    train_sft.main(cfg)
    return folder


INNER = dict(
    micro_bsz=2,
    global_bsz=4,
    lr=1e-3,
    lr_final=1e-4,
    warmup_steps=1,
    max_steps=3,
    eval_every=0,
    save_every=1,
    log_every=1,
)


def letters(prompts, completions, **columns):
    """The number of a's."""
    assert len(columns["column"]) == len(prompts)
    return [text.count("a") for text in completions]


def tiny(base, out, *stages, **settings):
    defaults = dict(
        stages=[{**INNER, **stage} for stage in stages],
        init_from=str(base / "sft/rwkv-final.pth"),
        out_dir=str(out),
        prompts=str(base / "prompts.jsonl"),
        device="cpu",
        block=4,
        max_completion_length=6,
        temperature=1.0,
        top_p=1.0,
    )
    return Config(**{**defaults, **settings})


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# What the scripted judge says of an answer, in turn.
SAYS = {
    "w": ["3 things.\nScore: 3.5", "Score: 4.5"],
    "x": ["Score: 1", "no idea"],
    "y": ["Score: 4", "Score: 4"],
    "z": ["nothing", "Score: 9"],
    "v": ["Score: 0\nScore: 1", "Score: 1"],
}
MEANS = {"w": 4.0, "x": 1.0, "y": 4.0, "z": None, "v": 1.0}
PARSED = {"w": 1, "x": 0.5, "y": 1, "z": 0, "v": 1}
# Four answers of a letter to each prompt.
ANSWERS = {"one": "wxyz", "two": "xvxx", "three": "zzxz", "four": "xwzy", "five": "yyyy"}


@pytest.fixture
def scripted(base, tmp_path, monkeypatch):
    """The engine answers a chat with ANSWERS, and a judge's text with SAYS of the answer in it.

    -> the settings of a run with these prompts.
    """

    def generate(model, prompts, *, n=1, tokenizer=None, state=None, **options):
        completions = []
        for ids in prompts:
            text = tokenizer.decode(ids)
            if "Assistant:" in text:
                texts = ANSWERS[text.split()[1]]
            else:
                texts = SAYS[text.split("<")[1][0]]
                assert state is not None and len(texts) == n
            for k in range(n):
                completions.append(engine.Completion([1, 0], texts[k], [0.0, 0.0], "stop"))
        return completions

    monkeypatch.setattr(engine, "generate", generate)
    monkeypatch.setattr(self_reward, "measure", lambda *args: {})
    path = write(tmp_path / "p.jsonl", *[{"prompt": chat(name)} for name in ANSWERS])
    return dict(prompts=str(path), judge_template="Rate it. {prompt} <{response}>")


SCRIPTED_STAGE = {"kind": "self_reward", "judge_samples": 2}


def test_a_round_with_a_scripted_judge(base, tmp_path, monkeypatch, scripted):
    """Pairs on disk are (max, min) of the means over valid scores; what is dropped is counted."""

    def is_good(prompt, text):
        return text in "wy"

    cfg = tiny(base, tmp_path / "run", SCRIPTED_STAGE, block=2, check=is_good, **scripted)
    self_reward.main(cfg)
    folder = tmp_path / "run/01-self_reward"
    judged = "".join(ANSWERS.values())
    scores = lines(folder / "scores.jsonl")
    assert [row["score"] for row in scores] == [MEANS[answer] for answer in judged]
    assert [row["parsed"] for row in scores] == [PARSED[answer] for answer in judged]
    # y is as good as w, and later
    assert lines(folder / "pairs.jsonl") == [
        {
            "prompt": chat(name),
            "chosen": "w",
            "rejected": "x",
            "chosen_score": 4,
            "rejected_score": 1,
        }
        for name in ("one", "four")
    ]
    report = json.loads((folder / "done.json").read_text())["report"]
    assert report["dropped"] == {"tie": 2, "fewer than two scores": 1} and report["pairs"] == 2
    # Of the answers with a score: w > x and y > x, of prompts one and four.
    assert report["agreement"] == report["best_vs_worst"] == 1
    assert report["parse_rate"] == pytest.approx(sum(PARSED[a] for a in judged) / 20)
    page = (tmp_path / "run/report.md").read_text()
    assert "01-self_reward" in page and "chosen 4.000: w" in page
    assert (tmp_path / "run/report.png").stat().st_size > 3000

    # The stage again, from its candidates and scores.
    before = {name: (folder / name).read_text() for name in ("pairs.jsonl", "scores.jsonl")}
    for name in ("pairs.jsonl", "done.json"):
        (folder / name).unlink()
    monkeypatch.setattr(engine, "generate", None)
    self_reward.main(cfg)
    assert before == {name: (folder / name).read_text() for name in before}


def test_functions_of_the_config_decide_what_a_pair_is(base, tmp_path, scripted):
    def last_and_first(scores):
        return (len(scores) - 1, 0) if scores[-1] is not None else None

    def far_apart(good, bad):
        return good - bad > 3

    def is_three(score):
        return score == 3

    def broken_score(score):
        return 1 / 0

    def run(name, **functions):
        stage = {**SCRIPTED_STAGE, **functions}
        self_reward.main(tiny(base, tmp_path / name, stage, **scripted))

    run("a", choose_pair=last_and_first)
    pairs = lines(tmp_path / "a/01-self_reward/pairs.jsonl")
    assert [(row["chosen"], row["rejected"]) for row in pairs] == [("y", "x")]
    with pytest.raises(UserError, match="no pairs of 5 prompts.*'not valid_pair': 2"):
        run("b", valid_pair=far_apart)
    with pytest.raises(UserError, match="'fewer than two scores': 5"):
        run("c", valid_score=is_three)
    with pytest.raises(UserError, match="broken_score.*failed: ZeroDivisionError"):
        run("d", valid_score=broken_score)
    assert len(lines(tmp_path / "d/01-self_reward/scores.jsonl")) == 20


TEMPLATES = [
    "Rate this. Question: {prompt}\nAnswer: {response}\nVerdict",
    "{prompt} <- {response}",
    "Jinja. {{ prompt }}{% if response %}\nA: {{ response }}{% endif %}!",
]


def filled_in(template, prompt, response):
    for tag in ("{% if response %}", "{% endif %}"):
        template = template.replace(tag, "")
    for name, text in (("prompt", prompt), ("response", response)):
        template = template.replace(f"{{{{ {name} }}}}", text).replace(f"{{{name}}}", text)
    return template


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_rubric_that_is_read_once_gives_what_the_whole_text_gives(template, base):
    model, tokenizer, _ = engine.load(base / "sft/rwkv-final.pth", "cpu", torch.float32)
    values = {" 0": 0, " 10": 10, " 3": 3}
    cfg = Config(judge="expected", judge_template=template, judge_choices=values)
    judge = Judge(cfg, model, tokenizer)
    assert judge.rubric in template and (judge.state is None) == (template == TEMPLATES[1])
    prompts, texts = [chat("what is\n\nit"), "plain"], ["ab", "b\n\n\na"]
    shown = [("what is\nit", "ab"), ("plain", "b\na")]
    for (prompt, text), row in zip(shown, judge(prompts, texts, [0, 1]), strict=True):
        whole = BYTES.encode(filled_in(template, prompt, text) + " Score:")
        p = {}  # each choice's probability, from the logits of one plain pass
        for choice in values:
            ids = torch.tensor([whole + BYTES.encode(choice)])
            with torch.no_grad():
                logps = model(ids[:, :-1])[0].log_softmax(-1)[0]
            logps = logps.gather(-1, ids[0, 1:, None])[:, 0]
            p[choice] = math.exp(logps[-len(choice) :].double().sum())
        expected = sum(values[choice] * p[choice] for choice in values) / sum(p.values())
        assert row["score"] == pytest.approx(expected, abs=1e-5)

    sampled = dict(judge="sample", judge_samples=2, judge_temperature=0, judge_max_tokens=5)
    cfg = dataclasses.replace(cfg, **sampled)
    rows = Judge(cfg, model, tokenizer)(prompts, texts, [0, 1])
    options = dict(max_new_tokens=5, temperature=0, tokenizer=BYTES, stop=cfg.stop)
    for row, prompt, text in zip(rows, prompts, texts, strict=True):
        whole = BYTES.encode(render(cfg, prompt, text))
        assert row["said"] == [engine.generate(model, [whole], **options)[0].text] * 2


def more_a_than_b(prompt, text):
    return text.count("a") > text.count("b")


def length(prompts, completions, **columns):
    return [len(text) for text in completions]


@pytest.fixture(scope="module")
def whole_run(base, tmp_path_factory):
    """Every kind of stage in one run -> (cfg, the done.json of each)."""
    folder = tmp_path_factory.mktemp("whole_run")
    preferences = [{"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(8)]
    write(folder / "preferences.jsonl", *preferences)
    judge = dict(kind="train_judge", max_prompts=12)
    lora = dict(tune="lora", lora_r=4)
    cfg = tiny(
        base,
        folder / "run",
        {"kind": "sft", "data": str(base / "sft.jsonl")},
        {"kind": "dpo", "data": str(folder / "preferences.jsonl")},
        {**judge, "judge": "head", "lora_r": 4},
        {"kind": "self_reward", "judge": "head"},
        {**judge, "lora_r": 4},
        {"kind": "self_reward"},
        {**judge, "tune": "state"},
        {"kind": "self_reward"},
        {"kind": "spin", "data": str(base / "sft.jsonl"), **lora},
        {"kind": "external_reward", "reward": length, **lora},
        judge="expected",
        judge_template="Q {prompt} A {response}",
        judge_cue=" ok?",
        judge_choices={" n": 0, " y": 1},
        num_candidates=6,
        check=more_a_than_b,
    )
    self_reward.main(cfg)
    folders = sorted((folder / "run").glob("[0-9]*"))
    return cfg, [json.loads((path / "done.json").read_text()) for path in folders]


def test_every_stage_runs_and_hands_on(whole_run):
    cfg, done = whole_run
    out = Path(cfg.out_dir)
    kinds = ["start", *[stage["kind"] for stage in cfg.stages]]
    assert [row["stage"][3:] for row in done] == kinds
    assert done[3]["judge_model"].endswith("03-train_judge/lora-final.safetensors")
    assert done[7]["judge_model"].endswith("state-final.pth")
    for number, judge in ((4, "03-train_judge/lora"), (6, "05-train_judge/lora")):
        begun_with = json.loads((out / done[number]["stage"] / "stage.json").read_text())
        assert judge in begun_with["judge_model"]
        assert done[number]["report"]["agreement"] is not None
    begun_with = json.loads((out / "08-self_reward/stage.json").read_text())
    assert "07-train_judge/state" in begun_with["judge_model"]
    begun_with = json.loads((out / "02-dpo/stage.json").read_text())
    assert begun_with["init_from"].endswith("01-sft/rwkv-final.pth")
    page = (out / "report.md").read_text()
    assert all(row["stage"] in page for row in done)


def test_the_kl_of_the_report_is_by_hand(whole_run):
    cfg, done = whole_run
    assert done[0]["kl"] == pytest.approx(0, abs=1e-5)
    model, start = load_model(done[10]["init_from"])[0], load_model(cfg.init_from)[0]
    prompts = [BYTES.encode(f"User: tell {i}\n\nAssistant:") for i in range(20)]
    options = dict(max_new_tokens=6, tokenizer=BYTES, stop=cfg.stop, seed=cfg.seed)
    kl = 0.0
    for ids, completion in zip(prompts, engine.generate(model, prompts, **options), strict=True):
        x = torch.tensor([ids + completion.tokens])
        logps = [m.token_logprobs(x[:, :-1], x[:, 1:])[0, len(ids) - 1 :] for m in (model, start)]
        kl += (logps[0].sum() - logps[1].sum()).item() / 20
    assert done[10]["kl"] == pytest.approx(kl, abs=1e-4) and abs(kl) > 1e-4


def test_spin_sets_the_data_against_the_models_own_answers(whole_run, base):
    cfg, done = whole_run
    chats = [row["messages"] for row in lines(base / "sft.jsonl")]
    gold = {prompt["content"]: reply["content"] for prompt, reply in chats}
    pairs = lines(Path(cfg.out_dir) / "09-spin/pairs.jsonl")
    assert 0 < len(pairs) < 48
    for row in pairs:
        assert row["chosen"] == gold[row["prompt"][0]["content"]]
        assert row["rejected"].strip() not in ("", row["chosen"])
    assert len(pairs) + done[9]["report"]["dropped"]["empty or equal"] == 48


def test_a_lora_is_trained_further_over_the_same_base(whole_run):
    _, done = whole_run
    last, spin = load_model(done[10]["init_from"])[0], load_model(done[9]["init_from"])[0]
    assert fingerprint(last) == fingerprint(spin)
    ids = torch.arange(9)[None]
    assert not torch.equal(last(ids)[0], spin(ids)[0])


def test_a_complete_run_does_nothing_again(whole_run, capsys):
    cfg, done = whole_run
    paths = Path(cfg.out_dir).glob("*/*")
    stamps = {p: p.stat().st_mtime_ns for p in paths if p.name != "stage.json"}
    self_reward.main(cfg)
    assert capsys.readouterr().out.count("is complete") == len(done)
    assert stamps == {p: p.stat().st_mtime_ns for p in stamps}


def same_weights(a, b):
    first, second = torch.load(a, weights_only=True), torch.load(b, weights_only=True)
    return all(torch.equal(first[key], second[key]) for key in first)


def test_spin_and_a_round_are_dpo_on_their_pairs(base, tmp_path):
    """The weights are train_dpo.py's on (data or best, own or worst), bit for bit."""
    spin = {"kind": "spin", "data": str(base / "sft.jsonl")}
    cfg = tiny(base, tmp_path / "run", spin, {"kind": "external_reward", "reward": letters})
    self_reward.main(cfg)
    start = cfg.init_from
    for number, name in ((1, "01-spin"), (2, "02-external_reward")):
        made = tmp_path / "run" / name
        dpo_cfg = train_dpo.Config(
            data=str(made / "pairs.jsonl"),
            init_from=start,
            out_dir=str(tmp_path / name),
            device="cpu",
            seed=cfg.seed + 1000 * number,
            **INNER,
        )
        train_dpo.main(dpo_cfg)
        start = str(made / "rwkv-final.pth")
        assert same_weights(start, tmp_path / name / "rwkv-final.pth")
    for row in lines(tmp_path / "run/02-external_reward/pairs.jsonl"):
        assert row["chosen"].count("a") == row["chosen_score"] > row["rejected_score"]
        assert row["rejected"].count("a") == row["rejected_score"]


def same_run(a, b):
    """The same lines and weights in every stage."""
    names = ("candidates.jsonl", "scores.jsonl", "pairs.jsonl")
    paths = [path for path in sorted(a.glob("*/*")) if path.name in names]
    assert len(paths) >= 3
    for path in paths:
        assert path.read_text() == (b / path.relative_to(a)).read_text(), path
    for path in a.glob("*/rwkv-final.pth"):
        assert same_weights(path, b / path.relative_to(a)), path


async def reward_of_ids(completion_ids, **columns):
    return np.array([len(ids) + ids[0] / 1000 for ids in completion_ids], dtype=np.float32)


class RewardOfAColumn:
    def __call__(self, prompts, completions, column):
        return [
            torch.tensor(len(text) + n / 100) for text, n in zip(completions, column, strict=True)
        ]


@pytest.mark.parametrize(
    "reward, known",
    [(reward_of_ids, None), (RewardOfAColumn(), ["completion_ids"])],
    ids=["async, of ids, an array", "an object, of a column, tensors"],
)
def test_a_reward_from_outside_is_called_as_grpo_calls_it(reward, known, base, tmp_path):
    """With the ids that were sampled, end id included, and the columns that it names."""
    stage = {"kind": "external_reward", "reward": reward}
    cfg = tiny(base, tmp_path / "run", stage, max_prompts=6)
    self_reward.main(cfg)
    folder = tmp_path / "run/01-external_reward"
    answers, scores = lines(folder / "candidates.jsonl"), lines(folder / "scores.jsonl")
    for answer, score in zip(answers, scores, strict=True):
        ids = answer["ids"]
        assert len(ids) == answer["tokens"] and BYTES.decode(ids).startswith(answer["text"])
        assert (ids[-1] == BYTES.end_id) == (len(ids) < 6 or answer["finish_reason"] == "stop")
        if known is None:
            assert score["score"] == pytest.approx(len(ids) + ids[0] / 1000, abs=1e-5)
        else:
            wanted = len(answer["text"]) + answer["number"] / 100
            assert score["score"] == pytest.approx(wanted, abs=1e-5)


def test_in_a_locale_that_is_not_utf8_its_files_are(base, tmp_path):
    rows = [{"prompt": chat("说 你好 😀"), "answer": "好"}, {"prompt": chat("é"), "answer": "ê"}]
    write(tmp_path / "p.jsonl", *rows)
    (tmp_path / "config_é.py").write_text(
        f"""from self_reward import external_reward
init_from = {str(base / "sft/rwkv-final.pth")!r}
prompts = {str(tmp_path / "p.jsonl")!r}
max_completion_length, temperature, device = 6, 1.0, "cpu"
def reward(completions, answer, **columns):
    return [len(text) + ord(a) for text, a in zip(completions, answer)]
stages = [external_reward(reward=reward, **{INNER!r})]
""",
        encoding="utf-8",
    )
    command = [sys.executable, "self_reward.py", str(tmp_path / "config_é.py")]
    command += [f"--out_dir={tmp_path / 'run'}"]
    locale = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"}
    subprocess.run(command, cwd=ROOT, env={**os.environ, **locale}, check=True, timeout=120)
    folder = tmp_path / "run/01-external_reward"
    for name in ("candidates.jsonl", "pairs.jsonl"):
        assert chat("说 你好 😀") in [row["prompt"] for row in lines(folder / name)], name
    assert "说 你好 😀" in (tmp_path / "run/report.md").read_text(encoding="utf-8")


def test_cut_off_anywhere_it_goes_on_where_it_stood(base, tmp_path, monkeypatch):
    stage = {"kind": "external_reward", "reward": letters}
    self_reward.main(tiny(base, tmp_path / "whole", stage))
    out, real, calls = tmp_path / "parts/01-external_reward", engine.generate, []

    def stop_generate_at(n_calls):
        calls.clear()

        def generate(*args, **options):
            calls.append(options.get("indices"))
            if len(calls) == n_calls:
                raise KeyboardInterrupt
            return real(*args, **options)

        monkeypatch.setattr(engine, "generate", generate)

    for n_calls in (4, 2):  # the first call is the start's own measurement
        stop_generate_at(n_calls)
        with pytest.raises(KeyboardInterrupt):
            self_reward.main(tiny(base, tmp_path / "parts", stage))
    n = len(lines(out / "candidates.jsonl"))
    assert n == 16 * 3

    # Half a line; then lines of a block that is not complete, and scoring that stops in its turn.
    whole = (tmp_path / "whole/01-external_reward/candidates.jsonl").read_bytes().split(b"\n")
    stop_generate_at(1)
    (out / "candidates.jsonl").write_bytes(b"\n".join(whole[: n - 1]) + b"\n" + whole[n - 1][:20])
    with pytest.raises(KeyboardInterrupt):
        self_reward.main(tiny(base, tmp_path / "parts", stage))
    assert len(lines(out / "candidates.jsonl")) == n - 1
    stop_generate_at(99)
    (out / "candidates.jsonl").write_bytes(b"\n".join(whole[:17]) + b"\n" + whole[17][:20])
    blocks = []

    def stopping_letters(prompts, completions, **columns):
        blocks.append(completions)
        if len(blocks) == 2:
            raise KeyboardInterrupt
        return letters(prompts, completions, **columns)

    stopping_letters.__name__ = "letters"
    with pytest.raises(KeyboardInterrupt):
        self_reward.main(tiny(base, tmp_path / "parts", {**stage, "reward": stopping_letters}))
    assert list(calls[0]) == [4, 5, 6, 7] and len(lines(out / "scores.jsonl")) == 16
    self_reward.main(tiny(base, tmp_path / "parts", stage))
    same_run(tmp_path / "whole", tmp_path / "parts")


def on_processes(path, n):
    """self_reward.py with this config file on n processes -> the completed process."""
    launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={n}"]
    launch += ["--master_port", str(29950 + os.getpid() % 1000), "--"]
    command = [*launch, "self_reward.py", str(path)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def config_file(base, folder, out, extra=""):
    """A config of two stages that runs in processes of its own -> its path."""
    inner = ", ".join(f"{key}={value}" for key, value in INNER.items())
    path = folder / "c.py"
    path.write_text(f"""
from self_reward import external_reward, self_reward
def letters(prompts, completions, **columns):
    return [text.count("a") for text in completions]
_inner = dict({inner})
_template = "Rate. {{prompt}} A {{response}}"
stages = [
    external_reward(reward=letters, **_inner),
    self_reward(judge="expected", judge_template=_template, **_inner),
]
init_from = {str(base / "sft/rwkv-final.pth")!r}
prompts = {str(base / "prompts.jsonl")!r}
out_dir = {str(out)!r}
device, block, max_completion_length, temperature, top_p = "cpu", 4, 6, 1.0, 1.0
judge_choices = {{" a": 0.0, " b": 1.0}}
{extra}
""")
    return path


def test_on_two_processes_the_same_lines(base, tmp_path):
    """Prompts are split over the ranks; begun on one and gone on with on two, and the reverse."""
    one, two = tmp_path / "one", tmp_path / "two"
    self_reward.main(load_config(Config, [str(config_file(base, tmp_path, one))]))
    path = config_file(base, tmp_path, two)
    folder = two / "01-external_reward"
    folder.mkdir(parents=True)
    whole = (one / "01-external_reward/candidates.jsonl").read_bytes().split(b"\n")
    (folder / "candidates.jsonl").write_bytes(b"\n".join(whole[:5]) + b"\n")
    done = on_processes(path, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("candidates.jsonl", "scores.jsonl", "pairs.jsonl"):
        assert (folder / name).read_text() == (one / folder.name / name).read_text(), name
    # The weights differ in their last digits.
    a, b = (lines(run / "02-self_reward/candidates.jsonl") for run in (one, two))
    n_equal = sum(x["text"] == y["text"] for x, y in zip(a, b, strict=True))
    assert n_equal > 0.9 * len(a)
    a, b = (lines(run / "01-external_reward/metrics.jsonl") for run in (one, two))
    assert [row["loss"] for row in a] == pytest.approx([row["loss"] for row in b], rel=1e-3)
    assert len(a) == 3
    (two / "02-self_reward/done.json").unlink()
    self_reward.main(load_config(Config, [str(path)]))  # goes on from two processes' files
    assert (two / "02-self_reward/done.json").exists()


def test_a_stage_that_lowers_the_evaluation_is_undone(base, tmp_path, capsys):
    values = iter([0.5, 0.6, 0.58, 0.3, 0.7])

    def eval_fn(model, tokenizer):
        return {"first": next(values), "other": 9.0}

    stages = [{"kind": "external_reward", "reward": letters}] * 4
    cfg = tiny(base, tmp_path / "run", *stages, max_drop=0.1, eval_fn=eval_fn)
    self_reward.main(cfg)
    printed, out = capsys.readouterr().out, tmp_path / "run"
    assert printed.count("is undone") == 1
    assert (
        "03-external_reward is undone: 0.3000 after 0.6000; "
        "the run goes on from 01-external_reward" in printed
    )
    starts = []
    for number in (1, 2, 3, 4):
        begun_with = json.loads((out / f"{number:02d}-external_reward/stage.json").read_text())
        starts.append(begun_with["init_from"].split("/")[-2])
    first, second = "01-external_reward", "02-external_reward"
    assert starts == ["sft", first, second, first]
    assert "03-external_reward (undone)" in (out / "report.md").read_text()
    self_reward.main(cfg)  # from the files: the same, without a value drawn


def test_without_eval_fn_the_loss_on_eval_data_counts(base, tmp_path, capsys):
    stage = {"kind": "external_reward", "reward": letters, "lr": 0.1}
    data = str(base / "sft.jsonl")
    self_reward.main(tiny(base, tmp_path / "loss", stage, eval_data=data, max_drop=0.0))
    assert "01-external_reward is undone: -" in capsys.readouterr().out


def test_fresh_deletes_what_it_wrote_and_nothing_else(base, tmp_path):
    out = tmp_path / "run"
    judge = {"judge": "expected", "judge_template": "{prompt}{response}"}
    external = {"kind": "external_reward", "reward": letters}
    cfg = tiny(base, out, external, {"kind": "self_reward", **judge})
    self_reward.main(cfg)
    (out / "01-external_reward/notes.txt").write_text("the user's")
    (out / "07-other").mkdir()
    (out / "07-other/rwkv-final.pth").write_text("not ours")
    changed = dataclasses.replace(cfg, stages=[{**cfg.stages[0], "lr": 1e-4}])
    words = "01-external_reward was begun with lr='0.001', now '0.0001'"
    with pytest.raises(UserError, match=words):
        self_reward.main(changed)
    self_reward.clear(out, RUN)
    left = [str(path.relative_to(out)) for path in sorted(out.glob("**/*")) if path.is_file()]
    ours = ["report.md", "report.png"]
    assert left == ["01-external_reward/notes.txt", "07-other/rwkv-final.pth", *ours]
    self_reward.main(dataclasses.replace(changed, fresh=True))


def stage(kind="self_reward", **settings):
    template = {"judge_template": "{prompt}{response}"} if kind == "self_reward" else {}
    return {"kind": kind, **template, **settings}


def broken(prompts, completions, **columns):
    if "tell 17" in str(prompts):
        raise ValueError("boo")
    return [0.0] * len(prompts)


@pytest.mark.parametrize(
    "stages, settings, words",
    [
        ([], {}, "no stages"),
        (["dpoo"], {}, "stage 1: there is no stage 'dpoo'; did you mean 'dpo'"),
        ([{"kind": "spinn"}], {}, "did you mean 'spin'"),
        (
            [stage(), stage(beat=0.1)],
            {},
            "stage 2, self_reward: 'beat' is none of its settings; did you mean 'beta'",
        ),
        ([stage("spin")], {}, "spin: it needs data"),
        ([stage("train_judge")], {}, "it needs check"),
        ([stage(num_candidates=0)], {}, "self_reward: num_candidates=0: expected"),
        ([stage(judge_template="{prompt} only")], {}, r"judge_template has no \{response\}"),
        ([stage(judge_template="{prompt} {respons}")], {}, "KeyError"),
        ([stage(judge_template="{{ promt }}{{ response }}")], {}, "UndefinedError"),
        ([stage(score_pattern="(")], {}, "score_pattern: .*error"),
        ([stage(score_range=(5, 0))], {}, "score_range=.*expected the lowest, then the highest"),
        ([stage(judge_choices={" 1": "one", " 2": 2})], {}, "judge_choices: ' 1' is 'one'"),
        ([stage(judge_choices={1: 1, 2: 2})], {}, "judge_choices: 1 is 1; expected a text"),
        ([stage(judge_choices={" 1": 1})], {}, "judge_choices: expected two or more"),
        ([stage()], dict(recipe="x", stages={"a": [], "b": []}), "recipe=x: the config has a, b"),
        ([stage()], dict(prompts="no.jsonl"), "no.jsonl does not exist"),
        ([stage(first_prompt=20)], {}, "no prompts from number 20"),
        ([stage(judge="head")], {}, "judge=head, but .*rwkv-final.pth has no score.weight"),
        (
            [stage("external_reward", reward=broken)],
            {},
            "broken failed: ValueError: boo.*; .*scores.jsonl keeps what was done before",
        ),
        (
            [stage(max_completion_length=1, judge_max_tokens=2)],
            {},
            "no valid score in 16 judgements.*the judge said '",
        ),
        ([stage()], dict(init_from=""), "which model"),
    ],
)
def test_bad_input_is_a_line_and_keeps_the_data(stages, settings, words, base, tmp_path):
    cfg = dataclasses.replace(tiny(base, tmp_path / "run"), **{"stages": stages, **settings})
    with pytest.raises(UserError, match=words) as e:
        self_reward.main(cfg)
    assert "\n" not in str(e.value)
    if "broken" in words:
        folder = tmp_path / "run/01-external_reward"
        assert len(lines(folder / "scores.jsonl")) == 64
        assert len(lines(folder / "candidates.jsonl")) == 80
    if "valid score" in words:
        folder = tmp_path / "run/01-self_reward"
        assert len(lines(folder / "scores.jsonl")) == 16
        assert len(lines(folder / "candidates.jsonl")) == 80


@pytest.mark.parametrize("name", ["tiny", "1b5"])
def test_the_configs_hold_stages_that_exist(name):
    cfg = load_config(Config, [str(ROOT / f"config/self_reward_{name}.py")])
    for recipe in cfg.stages if isinstance(cfg.stages, dict) else [""]:
        assert len(self_reward.chosen_stages(dataclasses.replace(cfg, recipe=recipe))) >= 1
    if name == "1b5":
        head = rubric(cfg)
        assert head.endswith('<total points>"\nUser:') and len(head) > 1400
        assert "Assistant:" not in head
    with pytest.raises(UserError, match="recipe=dpo"):
        self_reward.chosen_stages(dataclasses.replace(cfg, recipe="dpo", stages={"a": []}))


def written(folder):
    """Bytes of the lines that a run has written."""
    return sum(path.stat().st_size for path in folder.rglob("*.jsonl"))


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_where_it_would(base, tmp_path):
    """SIGKILL ten times, in sampling, judging and training: the same pairs and weights."""
    longer = (
        "stages = [{**stage, 'max_steps': 12, 'save_every': 3} for stage in stages]\n"
        "num_candidates = 6"
    )
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    path = config_file(base, tmp_path, tmp_path / "whole", longer)
    command = [sys.executable, "self_reward.py", str(path)]
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    all_bytes, n_kills, rng = written(tmp_path / "whole"), 0, random.Random(0)
    config_file(base, tmp_path, tmp_path / "parts", longer)
    piped = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while True:
        process = subprocess.Popen(command, cwd=ROOT, env=env, **piped)
        if n_kills < 10:  # at moments of the work, whatever the load of the machine
            until = written(tmp_path / "parts") + rng.uniform(0.01, 0.1) * all_bytes
            while process.poll() is None and written(tmp_path / "parts") < until:
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
        _, errors = process.communicate(timeout=600)
        if process.returncode == 0:
            break
        assert process.returncode == -signal.SIGKILL, errors
        n_kills += 1
    print(f"{n_kills} kills")
    assert n_kills >= 5
    same_run(tmp_path / "whole", tmp_path / "parts")


SCORED = {"number": 0, "candidate": 0, "score": 1.5, "parsed": 1}
SAID = {"number": 0, "candidate": 0, "prompt": "p", "text": "t", "tokens": 3}


@pytest.mark.parametrize(
    "kind, row, change, words",
    [
        (schemas.Candidate, SAID, {"text": 5}, "c.jsonl:2: text is 5; expected a valid string"),
        (schemas.Candidate, SAID, {"text": "\ud800"}, "c.jsonl:2: text is '.*'; expected whole"),
        (schemas.Candidate, SAID, {"tokens": -1}, "c.jsonl:2: tokens is -1; expected"),
        (schemas.Judgement, SCORED, {"score": "x"}, "c.jsonl:2: score is 'x'; expected a valid"),
        (schemas.Judgement, SCORED, {}, "c.jsonl has 2 lines, expected 1"),
    ],
)
def test_lines_that_no_stage_wrote_are_refused(kind, row, change, words, tmp_path):
    path, total = tmp_path / "c.jsonl", 4 if change else 1
    write(path, row, {**row, **change})
    with pytest.raises(UserError, match=words):
        self_reward.append_blocks(path, total, 1, None, RUN, kind)


def test_lines_of_other_prompts_are_refused():
    rows = [{**SAID, "candidate": k} for k in range(2)]
    self_reward.check_numbers("c.jsonl", rows, 2, ["p"])
    with pytest.raises(UserError, match="c.jsonl:1 is not candidate 0 of prompt 0"):
        self_reward.check_numbers("c.jsonl", rows, 2, ["another"])
    with pytest.raises(UserError, match="c.jsonl:2 is not candidate 1 of prompt 0"):
        self_reward.check_numbers("c.jsonl", [rows[0], rows[0]], 2)


@pytest.mark.parametrize(
    "done, words",
    [
        ("x", "done.json: it is 'x'; expected a valid dictionary"),
        ({"init_from": "a.pth"}, "done.json: stage is missing"),
        ({"stage": "../../x"}, "done.json: stage is '../../x'"),
        ({"stage": "00-start", "report": [1]}, "done.json: report is .1.; expected a valid dict"),
        ({"stage": "00-start", "value": "x"}, "done.json: value is 'x'; expected a valid number"),
    ],
)
def test_a_done_json_that_no_stage_wrote_is_refused(done, words, base, tmp_path):
    cfg = tiny(base, tmp_path / "run", self_reward.sft(data=str(base / "chats.jsonl")))
    folder = tmp_path / "run/00-start"
    folder.mkdir(parents=True)
    (folder / "done.json").write_text(json.dumps(done))
    with pytest.raises(UserError, match=words):
        self_reward.main(cfg)
    (folder / "done.json").unlink()
    write(folder / "stage.json", [1])
    with pytest.raises(UserError, match="stage.json: it is .1.; expected a valid dictionary"):
        self_reward.main(cfg)


@pytest.mark.parametrize("change", [{"prompt": []}, {"chosen": None}, {"chosen_score": "x"}])
def test_a_pair_that_no_stage_wrote_is_refused(change, tmp_path):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b", "chosen_score": 1.5}
    (tmp_path / "01-dpo").mkdir()
    write(tmp_path / "01-dpo/pairs.jsonl", pair)
    self_reward.write_report(tmp_path, [{"stage": "01-dpo", "dropped": {}}])
    write(tmp_path / "01-dpo/pairs.jsonl", pair, pair | change)
    with pytest.raises(UserError, match=f"pairs.jsonl:2: {next(iter(change))} is "):
        self_reward.write_report(tmp_path, [{"stage": "01-dpo", "dropped": {}}])
