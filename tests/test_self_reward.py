"""self_reward.py: scores, pairs and judge rows by hand, a scripted judge, stages that restart, runs on several processes."""

import dataclasses
import json
import math
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch

import common
import prepare
import sample
import self_reward
import train_dpo
from common import UserError
from conftest import ROOT
from model import RWKV, RWKVConfig, load_model
from self_reward import Config, choose_pair, judge_metrics, make_eft, parse_score
from test_sft import write

BYTES = prepare.load_tokenizer("bytes")

# ---------------------------------------------------------------------------------------------------------------------
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
    ("Note : 4/5", 4),
    ("Оценка: 4", 4),
    ("Puntuación: 4", 4),
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


def test_parse_score_on_a_table_of_judge_outputs():
    assert len(OUTPUTS) >= 40
    for text, want in OUTPUTS:
        assert parse_score(text) == want, text
    assert (
        parse_score("Score: 7", 0, 10) == 7
        and parse_score("Score: 7/10", 0, 10) == 7
        and parse_score("Score: 1", 2, 10) is None
    )
    assert (
        parse_score("grade <3> then <4>", pattern=r"<(\d)>") == 4
        and parse_score("grade <x>", pattern="<(.)>") is None
    )
    assert parse_score("a Score: 4", pattern="Score") is None  # a pattern without a group
    t = time.process_time()
    for part in ("score ", "score (", "score: ", "\n", "* ", "- ", "1", "score:\n"):  # nor for ever
        parse_score(part * 2000)
    assert time.process_time() - t < 2
    rng = random.Random(0)
    for _ in range(2000):  # never an exception
        parse_score("".join(rng.choices("score: 0123456789./-*\n（：٣②", k=rng.randint(0, 30))))


def test_choose_pair_takes_the_first_of_the_best_and_of_the_worst():
    assert choose_pair([2, 5, None, 1, 5, 1]) == (1, 3)
    assert choose_pair([None, 0.5, 0]) == (1, 2)
    assert (
        choose_pair([3, 3, 3])
        is choose_pair([3, None])
        is choose_pair([None, None])
        is choose_pair([])
        is None
    )


def test_judge_metrics_by_hand():
    # prompt 1: pairs 0>1 right, 2>1 right, 0>2 wrong (labels 3 1 2, scores 4 0 5); rho of ranks (2,1,3) and (3,1,2) = 1 - 6 * 2 / 24
    # prompt 2: labels equal; prompt 3: a tie is wrong, its rho 0, and no pair
    got = judge_metrics([[4, 0, 5], [1, 2, None], [1, 1, None]], [[3, 1, 2], [1, 1, 0], [1, 0, 1]])
    assert got == {
        "agreement": 2 / 4,
        "spearman": pytest.approx((1 - 6 * 2 / 24 + 0) / 2),
        "best_vs_worst": 1 / 2,
    }
    assert judge_metrics([[None, 1]], [[0, 1]]) == {
        "agreement": None,
        "spearman": None,
        "best_vs_worst": None,
    }


def test_judge_rows_are_balanced_within_every_prompt():
    rows, texts = (
        [{"prompt": f"p{i}"} for i in range(4)],
        [["a", "b", "c", "a", " "], ["d", "e"], ["f", "g", "h"], ["i"]],
    )
    labels = [[1, 0, 0, 1, 0], [0, 0], [5, 3, 3], [1]]
    cfg = Config(judge_template="{prompt} {response}", judge="expected", judge_cue=" S:")
    got = make_eft(rows, texts, labels, cfg)
    assert [(r["prompt"][:2], r["completion"]) for r in got] == [
        ("p0", " 1"),
        ("p0", " 0"),
        ("p2", " 5"),
        ("p2", " 3"),
    ]
    assert (
        got[0]["prompt"] == "p0 a S:"
        and got[1]["prompt"] in ("p0 b S:", "p0 c S:")
        and got[2]["prompt"] == "p2 f S:"
    )
    spoken = make_eft(rows, texts, labels, dataclasses.replace(cfg, judge="sample"))
    assert spoken[0] == {"prompt": "p0 a", "completion": " S: 1"} and parse_score("Score: 1") == 1
    heads = make_eft(rows, texts, labels, dataclasses.replace(cfg, judge="head"))
    assert [(r["prompt"], r["chosen"]) for r in heads] == [("p0", "a"), ("p2", "f")] and all(
        r["rejected"] in "bcgh" for r in heads
    )


def test_near_duplicates():
    a = (
        "write a short poem about the sea".split()
    )  # 7 words; common in order / half of both lengths > 0.7
    assert self_reward.alike("write a long poem about the sea".split(), [["x"], a])  # 6 / 7
    assert not self_reward.alike(
        "sea the about poem short a write".split(), [a]
    ) and not self_reward.alike(["write"], [a])
    assert not self_reward.alike("write a story of the sea".split(), [a])  # 4 / 6.5


# ---------------------------------------------------------------------------------------------------------------------
# runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model that answers one or two letters, and stops: so short that whole runs take a second."""
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = RWKV(RWKVConfig("x070", 2, 64, 257))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    model.save_pretrained(folder / "raw.pth")
    words = ["ab", "ba", "aa", "b", "a", "bb"]
    write(
        folder / "sft.jsonl",
        *(
            {
                "messages": [
                    {"role": "user", "content": f"say {i}"},
                    {"role": "assistant", "content": words[i * 7 % 6]},
                ]
            }
            for i in range(48)
        ),
    )
    write(
        folder / "prompts.jsonl",
        *({"prompt": [{"role": "user", "content": f"tell {i}"}], "column": i} for i in range(20)),
    )
    import train_sft

    train_sft.main(
        train_sft.Config(
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
    )
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
    """the number of a's"""
    assert len(columns["column"]) == len(prompts)
    return [text.count("a") for text in completions]


def tiny(base, out, *stages, **over):
    stages = [{**INNER, **stage} if stage["kind"] != "new_prompts" else stage for stage in stages]
    return Config(
        **{
            **dict(
                stages=stages,
                init_from=str(base / "sft/rwkv-final.pth"),
                out_dir=str(out),
                prompts=str(base / "prompts.jsonl"),
                device="cpu",
                block=4,
                max_completion_length=6,
                temperature=1.0,
                top_p=1.0,
            ),
            **over,
        }
    )


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


SAYS = {  # what the scripted judge says of an answer, in turn
    "w": ["3 things.\nScore: 3.5", "Score: 4.5"],
    "x": ["Score: 1", "no idea"],
    "y": ["Score: 4", "Score: 4"],
    "z": ["nothing", "Score: 9"],
    "v": ["Score: 0\nScore: 1", "Score: 1"],
}
ANSWERS = {
    "one": "wxyz",
    "two": "xvxx",
    "three": "zzxz",
    "four": "xwzy",
    "five": "yyyy",
}  # a candidate each


def scripted(monkeypatch):
    """sample.generate: the answers above for a chat, and for a judge's text what is said of the answer that stands in it."""

    def generate(model, prompts, *, n=1, tokenizer=None, state=None, **options):
        out = []
        for ids in prompts:
            text = tokenizer.decode(ids)
            if "Assistant:" in text:
                said = ANSWERS[text.split()[1]]
            else:
                said = SAYS[text.split("<")[1][0]]
                assert state is not None and len(said) == n
            out += [sample.Completion([1, 0], said[k], [0.0, 0.0], "stop") for k in range(n)]
        return out

    monkeypatch.setattr(self_reward.sample, "generate", generate)
    monkeypatch.setattr(self_reward, "measure", lambda *a: {})


def test_a_round_with_a_scripted_judge(base, tmp_path, monkeypatch):
    """Check 25: pairs on disk are (max, min) of the means over valid scores; what is dropped is counted and absent."""
    scripted(monkeypatch)
    write(
        tmp_path / "p.jsonl", *({"prompt": [{"role": "user", "content": name}]} for name in ANSWERS)
    )
    cfg = tiny(
        base,
        tmp_path / "run",
        {"kind": "self_reward", "judge_samples": 2},
        prompts=str(tmp_path / "p.jsonl"),
        block=2,
        judge_template="Rate it. {prompt} <{response}>",
        check=lambda prompt, text: text in "wy",
    )
    self_reward.main(cfg)
    folder = tmp_path / "run/01-self_reward"
    means = {"w": 4.0, "x": 1.0, "y": 4.0, "z": None, "v": 1.0}
    scores = lines(folder / "scores.jsonl")
    assert [row["score"] for row in scores] == [means[x] for name in ANSWERS for x in ANSWERS[name]]
    assert [row["parsed"] for row in scores[:4]] == [1, 0.5, 1, 0]
    assert [
        (
            r["prompt"][0]["content"],
            r["chosen"],
            r["rejected"],
            r["chosen_score"],
            r["rejected_score"],
        )
        for r in lines(folder / "pairs.jsonl")
    ] == [("one", "w", "x", 4, 1), ("four", "w", "x", 4, 1)]  # y is as good as w, and later
    done = json.loads((folder / "done.json").read_text())["report"]
    assert done["dropped"] == {"tie": 2, "fewer than two scores": 1} and done["pairs"] == 2
    # of answers with a score: one w>x, y>x; four w>x, y>x; three has one answer; parsed 2*(1+.5+1+0) + ...
    assert (
        done["agreement"] == 1
        and done["best_vs_worst"] == 1
        and done["parse_rate"]
        == pytest.approx(
            sum(
                {"w": 1, "x": 0.5, "y": 1, "z": 0, "v": 1}[x]
                for name in ANSWERS
                for x in ANSWERS[name]
            )
            / 20
        )
    )
    report = (tmp_path / "run/report.md").read_text()
    assert (
        "01-self_reward" in report
        and "chosen 4.000: w" in report
        and (tmp_path / "run/report.png").stat().st_size > 3000
    )
    before = {name: (folder / name).read_text() for name in ("pairs.jsonl", "scores.jsonl")}
    for name in ("pairs.jsonl", "done.json"):  # a stage again from its files
        (folder / name).unlink()
    monkeypatch.setattr(self_reward.sample, "generate", None)
    self_reward.main(cfg)
    assert before == {name: (folder / name).read_text() for name in before}


def test_functions_of_the_config_decide_what_a_pair_is(base, tmp_path, monkeypatch):
    scripted(monkeypatch)
    write(
        tmp_path / "p.jsonl", *({"prompt": [{"role": "user", "content": name}]} for name in ANSWERS)
    )
    over = dict(prompts=str(tmp_path / "p.jsonl"), judge_template="Rate it. {prompt} <{response}>")
    stage = {"kind": "self_reward", "judge_samples": 2}
    self_reward.main(
        tiny(
            base,
            tmp_path / "a",
            {**stage, "choose_pair": lambda s: (len(s) - 1, 0) if s[-1] is not None else None},
            **over,
        )
    )
    assert [
        (r["chosen"], r["rejected"]) for r in lines(tmp_path / "a/01-self_reward/pairs.jsonl")
    ] == [("y", "x")]
    with pytest.raises(UserError, match="no pairs of 5 prompts.*'not valid_pair': 2"):
        self_reward.main(
            tiny(
                base,
                tmp_path / "b",
                {**stage, "valid_pair": lambda good, bad: good - bad > 3},
                **over,
            )
        )
    with pytest.raises(UserError, match="'fewer than two scores': 5"):
        self_reward.main(
            tiny(base, tmp_path / "c", {**stage, "valid_score": lambda s: s == 3}, **over)
        )
    with pytest.raises(UserError, match="valid_score.*failed: ZeroDivisionError"):

        def valid_score(score):
            return 1 / 0

        self_reward.main(tiny(base, tmp_path / "d", {**stage, "valid_score": valid_score}, **over))
    assert len(lines(tmp_path / "d/01-self_reward/scores.jsonl")) == 20


TEMPLATES = [
    "Rate this. Question: {prompt}\nAnswer: {response}\nVerdict",
    "{prompt} <- {response}",
    "Jinja. {{ prompt }}{% if response %}\nA: {{ response }}{% endif %}!",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_kept_rubric_gives_what_the_whole_text_gives(template, base):
    path, run = (
        str(base / "sft/rwkv-final.pth"),
        common.Run(0, 1, torch.device("cpu"), torch.float32),
    )
    cfg = Config(
        init_from=path,
        judge="expected",
        judge_template=template,
        judge_cue=" Score:",
        judge_choices={" 0": 0, " 10": 10, " 3": 3},
    )
    judge = self_reward.Judge(cfg, run)
    assert judge.rubric in template and (judge.state is None) == (template == TEMPLATES[1])
    prompts, texts = [[{"role": "user", "content": "what is\n\nit"}], "plain"], ["ab", "b\n\n\na"]
    got = judge(prompts, texts, [0, 1])
    for prompt, text, row in zip(("what is\nit", "plain"), ("ab", "b\na"), got):
        whole = (
            template.replace("{{ prompt }}", prompt)
            .replace("{% if response %}", "")
            .replace("{{ response }}", text)
            .replace("{% endif %}", "")
            .replace("{prompt}", prompt)
            .replace("{response}", text)
            + " Score:"
        )
        p = []
        for choice in (
            " 0",
            " 10",
            " 3",
        ):  # each choice's probability, from the logits of one plain pass
            ids = torch.tensor([BYTES.encode(whole) + BYTES.encode(choice)])
            logp = (
                judge.model(ids[:, :-1])[0]
                .detach()
                .log_softmax(-1)[0]
                .gather(-1, ids[0, 1:, None])[:, 0]
            )
            p.append(math.exp(logp[-len(choice) :].double().sum()))
        assert row["score"] == pytest.approx(
            sum(v * q for v, q in zip((0, 10, 3), p)) / sum(p), abs=1e-5
        )
    cfg = dataclasses.replace(
        cfg, judge="sample", judge_samples=2, judge_temperature=0, judge_max_tokens=5
    )
    for row, prompt, text in zip(
        self_reward.Judge(cfg, run)(prompts, texts, [0, 1]), prompts, texts
    ):
        whole = BYTES.encode(self_reward.render(cfg, prompt, text))
        want = sample.generate(
            judge.model, [whole], max_new_tokens=5, temperature=0, tokenizer=BYTES, stop=cfg.stop
        )[0].text
        assert row["said"] == [want] * 2


def test_every_stage_runs_and_hands_on(base, tmp_path, capsys):
    """All seven kinds in one run; adapters of judges; a report; then a restart that does nothing again."""
    write(
        tmp_path / "prefs.jsonl",
        *({"prompt": f"p{i}", "chosen": "a", "rejected": "b"} for i in range(8)),
    )
    check = dict(check=lambda prompt, text: text.count("a") > text.count("b"))
    judge = dict(lora_r=4, max_prompts=12)
    cfg = tiny(
        base,
        tmp_path / "run",
        {"kind": "sft", "data": str(base / "sft.jsonl")},
        {"kind": "dpo", "data": str(tmp_path / "prefs.jsonl")},
        {"kind": "train_judge", **judge, "judge": "head"},
        {"kind": "self_reward", "judge": "head"},
        {"kind": "train_judge", **judge},
        {"kind": "self_reward"},
        {"kind": "train_judge", "tune": "state", "max_prompts": 12},
        {"kind": "self_reward"},
        {"kind": "new_prompts", "seeds": str(base / "prompts.jsonl"), "max_prompts": 30},
        {"kind": "self_reward"},
        {"kind": "spin", "data": str(base / "sft.jsonl"), "tune": "lora", "lora_r": 4},
        {
            "kind": "external_reward",
            "reward": lambda p, c, **k: [len(t) for t in c],
            "tune": "lora",
            "lora_r": 4,
        },
        judge="expected",
        judge_template="Q {prompt} A {response}",
        judge_cue=" ok?",
        judge_choices={" n": 0, " y": 1},
        num_candidates=6,
        **check,
    )
    self_reward.main(cfg)
    out = tmp_path / "run"
    done = [json.loads((folder / "done.json").read_text()) for folder in sorted(out.glob("[0-9]*"))]
    assert [d["stage"][3:] for d in done] == ["start", *(s["kind"] for s in cfg.stages)]
    assert done[3]["judge_model"].endswith("03-train_judge/lora-final.safetensors") and done[7][
        "judge_model"
    ].endswith("state-final.pth")
    assert done[0]["kl"] == pytest.approx(0, abs=1e-5)
    model, start = (load_model(p)[0] for p in (done[12]["init_from"], cfg.init_from))
    chats = [BYTES.encode(f"User: tell {i}\n\nAssistant:") for i in range(20)]
    kl = 0.0
    for ids, c in zip(
        chats,
        sample.generate(
            model, chats, max_new_tokens=6, tokenizer=BYTES, stop=cfg.stop, seed=cfg.seed
        ),
    ):
        x = torch.tensor([ids + c.tokens])
        a, b = (
            m.token_logprobs(x[:, :-1], x[:, 1:])[0, len(ids) - 1 :].sum().item()
            for m in (model, start)
        )
        kl += (a - b) / 20
    assert done[12]["kl"] == pytest.approx(kl, abs=1e-4) and abs(kl) > 1e-4
    for number, of in (
        (4, "03-train_judge/lora"),
        (6, "05-train_judge/lora"),
        (8, "07-train_judge/state"),
    ):
        stage = json.loads((out / done[number]["stage"] / "stage.json").read_text())
        assert of in stage["judge_model"] and done[number]["report"]["agreement"] is not None
    assert json.loads((out / "10-self_reward/stage.json").read_text())["prompts"].endswith(
        "09-new_prompts/prompts.jsonl"
    )
    assert json.loads((out / "02-dpo/stage.json").read_text())["init_from"].endswith(
        "01-sft/rwkv-final.pth"
    )
    new = [row["prompt"][0]["content"] for row in lines(out / "09-new_prompts/prompts.jsonl")]
    assert len(new) == len(set(new)) and all(text.strip() for text in new)
    gold = {
        row["messages"][0]["content"]: row["messages"][1]["content"]
        for row in lines(base / "sft.jsonl")
    }
    pairs = lines(out / "11-spin/pairs.jsonl")
    assert 0 < len(pairs) < 48 and all(
        r["chosen"] == gold[r["prompt"][0]["content"]] != r["rejected"].strip() != "" for r in pairs
    )
    assert len(pairs) + done[11]["report"]["dropped"]["empty or equal"] == 48
    last = load_model(done[12]["init_from"])[
        0
    ]  # the LoRA of the spin stage was trained on, over the same base
    spin = load_model(done[11]["init_from"])[0]
    assert last.fingerprint() == spin.fingerprint() and not torch.equal(
        *(m(torch.arange(9)[None])[0] for m in (last, spin))
    )
    report = (out / "report.md").read_text()
    assert all(d["stage"] in report for d in done)
    capsys.readouterr()
    stamps = {p: p.stat().st_mtime_ns for p in out.glob("*/*") if p.name != "stage.json"}
    self_reward.main(cfg)
    assert capsys.readouterr().out.count("is complete") == 13 and stamps == {
        p: p.stat().st_mtime_ns for p in stamps
    }


def test_spin_and_a_round_are_dpo_on_their_pairs(base, tmp_path):
    """Check 17: the weights are train_dpo.py's on (human, sample), bit for bit."""
    cfg = tiny(
        base,
        tmp_path / "run",
        {"kind": "spin", "data": str(base / "sft.jsonl")},
        {"kind": "external_reward", "reward": letters},
    )
    self_reward.main(cfg)
    start = cfg.init_from
    for number, name in ((1, "01-spin"), (2, "02-external_reward")):
        train_dpo.main(
            train_dpo.Config(
                data=str(tmp_path / "run" / name / "pairs.jsonl"),
                init_from=start,
                out_dir=str(tmp_path / name),
                device="cpu",
                seed=cfg.seed + 1000 * number,
                **INNER,
            )
        )
        start = str(tmp_path / "run" / name / "rwkv-final.pth")
        a, b = (
            torch.load(f, weights_only=True) for f in (start, tmp_path / name / "rwkv-final.pth")
        )
        assert all(torch.equal(a[k], b[k]) for k in a)
    for row in lines(tmp_path / "run/02-external_reward/pairs.jsonl"):
        assert (
            row["chosen"].count("a")
            == row["chosen_score"]
            > row["rejected_score"]
            == row["rejected"].count("a")
        )


def same_run(a, b):
    """the same lines and weights in every stage"""
    files = [
        p
        for p in sorted(a.glob("*/*"))
        if p.name in ("candidates.jsonl", "scores.jsonl", "pairs.jsonl")
    ]
    assert len(files) >= 3
    for path in files:
        assert path.read_text() == (b / path.relative_to(a)).read_text(), path
    for path in a.glob("*/rwkv-final.pth"):
        x, y = (torch.load(f, weights_only=True) for f in (path, b / path.relative_to(a)))
        assert all(torch.equal(x[k], y[k]) for k in x), path


def test_cut_off_anywhere_it_goes_on_where_it_stood(base, tmp_path, monkeypatch):
    stage = {"kind": "external_reward", "reward": letters}
    self_reward.main(tiny(base, tmp_path / "whole", stage))
    calls = []
    real = self_reward.sample.generate

    def generate(*args, **options):
        calls.append(options["indices"] if "indices" in options else None)
        if len(calls) == stop:
            raise KeyboardInterrupt
        return real(*args, **options)

    def letters_(prompts, completions, **columns):
        if scored and scored.pop() == 0:
            raise KeyboardInterrupt
        return letters(prompts, completions, **columns)

    letters_.__name__ = "letters"
    monkeypatch.setattr(self_reward.sample, "generate", generate)
    scored, out = [], tmp_path / "parts/01-external_reward"
    for stop in (4, 2):  # the first call is the start's own measurement
        with pytest.raises(KeyboardInterrupt):
            self_reward.main(tiny(base, tmp_path / "parts", stage))
        calls.clear()
    n = len(lines(out / "candidates.jsonl"))
    assert n == 16 * 3
    whole = (tmp_path / "whole/01-external_reward/candidates.jsonl").read_bytes().split(b"\n")
    for cut in (n - 1, 17):  # half a line, and lines of a block that is not complete
        (out / "candidates.jsonl").write_bytes(b"\n".join(whole[:cut]) + b"\n" + whole[cut][:20])
        stop = 99 if cut == 17 else 1
        calls.clear()
        with pytest.raises(KeyboardInterrupt):
            scored[:] = [0, 1]  # the second block of scores fails
            self_reward.main(tiny(base, tmp_path / "parts", {**stage, "reward": letters_}))
    assert list(calls[0]) == [4, 5, 6, 7] and len(lines(out / "scores.jsonl")) == 16
    self_reward.main(tiny(base, tmp_path / "parts", stage))
    same_run(tmp_path / "whole", tmp_path / "parts")


def torchrun(folder, n):
    return subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            f"--nproc_per_node={n}",
            "--master_port",
            str(29950 + os.getpid() % 1000),
            "--",
            "self_reward.py",
            str(folder / "c.py"),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )


def config_file(base, folder, out, extra=""):
    (folder / "c.py").write_text(f"""
from self_reward import external_reward, self_reward
def letters(prompts, completions, **columns):
    return [text.count("a") for text in completions]
_inner = dict({", ".join(f"{k}={v}" for k, v in INNER.items())})
stages = [external_reward(reward=letters, **_inner), self_reward(judge="expected", judge_template="Rate. {{prompt}} A {{response}}", **_inner)]
init_from, prompts, out_dir = {str(base / "sft/rwkv-final.pth")!r}, {str(base / "prompts.jsonl")!r}, {str(out)!r}
device, block, max_completion_length, temperature, top_p = "cpu", 4, 6, 1.0, 1.0
judge_choices = {{" a": 0.0, " b": 1.0}}
{extra}
""")


def test_on_two_processes_the_same_lines(base, tmp_path):
    """Prompts are split over the ranks; begun on two and gone on with on one, and the other way round."""
    config_file(base, tmp_path, tmp_path / "one")
    self_reward.main(common.load_config(Config, [str(tmp_path / "c.py")]))
    config_file(base, tmp_path, tmp_path / "two")
    (folder := tmp_path / "two/01-external_reward").mkdir(parents=True)
    whole = (tmp_path / "one/01-external_reward/candidates.jsonl").read_bytes().split(b"\n")
    (folder / "candidates.jsonl").write_bytes(b"\n".join(whole[:5]) + b"\n")
    done = torchrun(tmp_path, 2)
    assert done.returncode == 0, done.stderr[-3000:]
    for name in ("candidates.jsonl", "scores.jsonl", "pairs.jsonl"):
        assert (folder / name).read_text() == (
            tmp_path / "one/01-external_reward" / name
        ).read_text(), name
    a, b = (lines(tmp_path / run / "02-self_reward/candidates.jsonl") for run in ("one", "two"))
    assert len(a) == len(b) and sum(x["text"] == y["text"] for x, y in zip(a, b)) > 0.9 * len(
        a
    )  # weights differ in their last digits
    a, b = (lines(tmp_path / run / "01-external_reward/metrics.jsonl") for run in ("one", "two"))
    assert [x["loss"] for x in a] == pytest.approx([x["loss"] for x in b], rel=1e-3) and len(a) == 3
    (tmp_path / "two/02-self_reward/done.json").unlink()
    self_reward.main(
        common.load_config(Config, [str(tmp_path / "c.py")])
    )  # goes on from two processes' files
    assert (tmp_path / "two/02-self_reward/done.json").exists()


def test_a_stage_that_lowers_the_evaluation_is_undone(base, tmp_path, capsys):
    values = iter([0.5, 0.6, 0.58, 0.3, 0.7])
    cfg = tiny(
        base,
        tmp_path / "run",
        *[{"kind": "external_reward", "reward": letters}] * 4,
        max_drop=0.1,
        eval_fn=lambda model, tokenizer: {"mine": next(values), "other": 9.0},
    )
    self_reward.main(cfg)
    said, out = capsys.readouterr().out, tmp_path / "run"
    assert (
        said.count("is undone") == 1
        and "03-external_reward is undone: 0.3000 after 0.6000; the run goes on from 01-external_reward"
        in said
    )
    start = [
        json.loads((out / f"{i:02d}-external_reward/stage.json").read_text())["init_from"]
        for i in (1, 2, 3, 4)
    ]
    assert [s.split("/")[-2] for s in start] == [
        "sft",
        "01-external_reward",
        "02-external_reward",
        "01-external_reward",
    ]
    assert "03-external_reward (undone)" in (out / "report.md").read_text()
    self_reward.main(cfg)  # from the files: the same, without a value drawn
    by_loss = tiny(
        base,
        tmp_path / "loss",
        {"kind": "external_reward", "reward": letters, "lr": 0.1},
        eval_data=str(base / "sft.jsonl"),
        max_drop=0.0,
    )
    self_reward.main(by_loss)
    assert "01-external_reward is undone: -" in capsys.readouterr().out


def test_fresh_deletes_what_it_wrote_and_nothing_else(base, tmp_path):
    cfg = tiny(
        base,
        tmp_path / "run",
        {"kind": "external_reward", "reward": letters},
        {"kind": "self_reward", "judge": "expected", "judge_template": "{prompt}{response}"},
    )
    self_reward.main(cfg)
    mine = tmp_path / "run/01-external_reward/notes.txt"
    mine.write_text("mine")
    (tmp_path / "run/07-other").mkdir()
    (tmp_path / "run/07-other/rwkv-final.pth").write_text("not ours")
    changed = dataclasses.replace(cfg, stages=[{**cfg.stages[0], "lr": 1e-4}])
    with pytest.raises(
        UserError, match="01-external_reward was begun with lr='0.001', now '0.0001'"
    ):
        self_reward.main(changed)
    self_reward.clear(tmp_path / "run", common.Run(0, 1, torch.device("cpu"), torch.float32))
    left = [
        str(p.relative_to(tmp_path / "run"))
        for p in sorted(tmp_path.glob("run/**/*"))
        if p.is_file()
    ]
    assert left == [
        "01-external_reward/notes.txt",
        "07-other/rwkv-final.pth",
        "report.md",
        "report.png",
    ]
    self_reward.main(dataclasses.replace(changed, fresh=True))


def stage(kind="self_reward", **over):
    return {
        "kind": kind,
        **({"judge_template": "{prompt}{response}"} if kind == "self_reward" else {}),
        **over,
    }


def broken(prompts, completions, **columns):
    if "tell 17" in str(prompts):
        raise ValueError("boo")
    return [0.0] * len(prompts)


@pytest.mark.parametrize(
    "stages, over, words",
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
        ([stage(judge_template="{prompt} only")], {}, r"judge_template has no \{response\}"),
        ([stage(judge_template="{prompt} {respons}")], {}, "KeyError"),
        ([stage(judge_template="{{ promt }}{{ response }}")], {}, "UndefinedError"),
        ([stage(score_pattern="(")], {}, "score_pattern: .*error"),
        ([stage()], dict(recipe="x", stages={"a": [], "b": []}), "recipe=x: the config has a, b"),
        ([stage()], dict(prompts="TWICE"), "prompts 2 and 4 are the same"),
        ([stage()], dict(prompts="no.jsonl"), "no.jsonl does not exist"),
        ([stage(first_prompt=20)], {}, "no prompts from number 20"),
        ([stage(judge="head")], {}, "judge=head, but .*rwkv-final.pth has no score.weight"),
        (
            [stage("external_reward", reward=broken)],
            {},
            "broken failed on prompt .*tell 17.*boo; .*scores.jsonl keeps what was done before",
        ),
        (
            [stage(max_completion_length=1, judge_max_tokens=2)],
            {},
            "no valid score in 16 judgements.*the judge said '",
        ),
        ([stage()], dict(init_from=""), "which model"),
    ],
)
def test_bad_input_is_a_line_and_keeps_the_data(stages, over, words, base, tmp_path):
    write(tmp_path / "TWICE", *({"prompt": p} for p in ("a", "b", "c", "b")))
    over = {k: str(tmp_path / v) if v == "TWICE" else v for k, v in over.items()}
    cfg = dataclasses.replace(tiny(base, tmp_path / "run", **over), **{"stages": stages, **over})
    with pytest.raises(UserError, match=words) as e:
        self_reward.main(cfg)
    assert "\n" not in str(e.value)
    if "broken" in words:
        assert (
            len(lines(tmp_path / "run/01-external_reward/scores.jsonl")) == 64
            and len(lines(tmp_path / "run/01-external_reward/candidates.jsonl")) == 80
        )
    if "valid score" in words:
        assert (
            len(lines(tmp_path / "run/01-self_reward/scores.jsonl")) == 16
            and len(lines(tmp_path / "run/01-self_reward/candidates.jsonl")) == 80
        )


def test_make_eft_writes_judge_rows_and_measures_a_judge(base, tmp_path, capsys):
    write(
        tmp_path / "s.jsonl",
        *(
            {"prompt": f"q{i}", "completions": ["ab", {"text": "b"}], "scores": [5, 1]}
            for i in range(20)
        ),
    )
    cfg = self_reward.EftConfig(
        samples=str(tmp_path / "s.jsonl"),
        out=str(tmp_path / "eft"),
        judge="expected",
        judge_template="{prompt} {response}",
        device="cpu",
        judge_model=str(base / "sft/rwkv-final.pth"),
    )
    self_reward.make_eft_command(cfg)
    rows, val = lines(tmp_path / "eft.jsonl"), lines(tmp_path / "eft_val.jsonl")
    assert (
        len(rows) == 36
        and rows[0] == {"prompt": "q0 ab Score:", "completion": " 5"}
        and val[0] == {"prompt": "q18", "completions": ["ab", "b"], "scores": [5, 1]}
    )
    assert "2 held-out prompts: agreement " in capsys.readouterr().out
    write(tmp_path / "s.jsonl", {"prompt": "q", "completions": ["a", "b"], "scores": [1]})
    with pytest.raises(UserError, match="s.jsonl:1: want a prompt, completions and as many scores"):
        self_reward.make_eft_command(cfg)
    write(tmp_path / "s.jsonl", {"completions": ["ab", "b"]})
    with pytest.raises(UserError, match="s.jsonl:1: want a prompt"):
        self_reward.make_eft_command(dataclasses.replace(cfg, check=lambda prompt, text: True))
    write(
        tmp_path / "s.jsonl", *({"prompt": f"q{i}", "completions": ["ab", "b"]} for i in range(10))
    )
    self_reward.make_eft_command(
        dataclasses.replace(
            cfg,
            check=lambda prompt, text: text == "ab",
            judge="sample",
            judge_cue="Score:",
            judge_model="",
        )
    )
    assert lines(tmp_path / "eft.jsonl")[1] == {"prompt": "q0 b", "completion": "Score: 0"}


@pytest.mark.parametrize("name", ["tiny", "1b5"])
def test_the_configs_hold_stages_that_exist(name):
    cfg = common.load_config(Config, [str(ROOT / f"config/self_reward_{name}.py")])
    for recipe in cfg.stages if isinstance(cfg.stages, dict) else [""]:
        assert len(self_reward.check_stages(dataclasses.replace(cfg, recipe=recipe))) >= 2
    if name == "1b5":
        head = self_reward.rubric(cfg)
        assert (
            head.endswith('<total points>"\nUser:')
            and len(head) > 1400
            and "Assistant:" not in head
        )
    with pytest.raises(UserError, match="recipe=dpo"):
        self_reward.check_stages(dataclasses.replace(cfg, recipe="dpo", stages={"a": []}))


@pytest.mark.slow
def test_killed_at_ten_random_moments_it_ends_where_it_would(base, tmp_path):
    """SIGKILL ten times, in sampling, judging and training: the same pairs and weights, bit for bit."""
    env, command = (
        {**os.environ, "OMP_NUM_THREADS": "1"},
        [sys.executable, "self_reward.py", str(tmp_path / "c.py")],
    )
    more = "stages = [{**s, 'max_steps': 12, 'save_every': 3} for s in stages]\nnum_candidates = 6"
    config_file(base, tmp_path, tmp_path / "whole", more)
    t = time.time()
    subprocess.run(command, cwd=ROOT, env=env, check=True, capture_output=True)
    seconds, kills, rng = time.time() - t, 0, random.Random(0)
    config_file(base, tmp_path, tmp_path / "parts", more)
    while True:
        p = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        if kills < 10:
            time.sleep(rng.uniform(0.2, 0.6) * seconds)
            p.send_signal(signal.SIGKILL)
        _, errors = p.communicate(timeout=600)
        if p.returncode == 0:
            break
        assert p.returncode == -signal.SIGKILL, errors
        kills += 1
    print(f"{kills} kills")
    assert kills >= 5
    same_run(tmp_path / "whole", tmp_path / "parts")
