"""train_reward.py: losses by hand, scores that do not depend on how it is run, what it learns and
writes."""

import json
import math
import random

import export
import train_reward
from gosling.batch import score_answers
from gosling.config import UserError
from gosling.data import Preference, read_preferences, render_preference
from gosling.tokenizer import load_tokenizer
from gosling.tune import load_model
from gosling.weights import base_weights
from model import RWKV, RWKVConfig
from train_reward import Config, preference_loss, ranking_loss, row_loss

import pytest
import torch
from helpers import kill_after, random_model, rows, torchrun, write

BYTES = load_tokenizer("bytes")


def t(*x):
    return torch.tensor(x, dtype=torch.float64)


def test_losses_by_hand():
    c, r = t(1.0, 0.2, -3.0), t(0.5, 0.4, 1.0)
    for margin, coef in ((None, 0.0), (t(0.3, 0.0, 1.0), 0.0), (t(0.1, 0.2, 0.3), 0.01)):
        got = preference_loss(c, r, margin=margin, center_coef=coef)
        for i in range(3):
            m = 0.0 if margin is None else float(margin[i])
            want = math.log(1 + math.exp(-(float(c[i]) - float(r[i]) - m)))
            want += coef * (float(c[i]) + float(r[i])) ** 2
            assert got[i].item() == pytest.approx(want, abs=1e-9)
    # log(1 + exp(-0.5)) = 0.4740770; with margin 0.3: log(1 + exp(-0.2)) = 0.5981389;
    # centred: + 0.01 * 1.5^2
    assert preference_loss(t(1.0), t(0.5)).item() == pytest.approx(0.4740770, abs=1e-6)
    both = preference_loss(t(1.0), t(0.5), margin=t(0.3), center_coef=0.01)
    assert both.item() == pytest.approx(0.5981389 + 0.0225, abs=1e-6)
    c.requires_grad_()
    preference_loss(c, r).sum().backward()
    pairs = zip(c.detach(), r, strict=True)
    assert c.grad.tolist() == [pytest.approx(-1 / (1 + math.exp(float(a - b)))) for a, b in pairs]


def test_scores_of_any_size_are_numbers():
    losses = []
    for scores in ([1, 10**30], [10**30, 1]):
        row = {"prompt": "a", "responses": ["b", "c"], "scores": scores}
        losses.append(row_loss(t(0.0, 1.0), render_preference(row, BYTES), Config()).item())
    assert losses == pytest.approx([math.log1p(math.exp(-1)), math.log1p(math.exp(1))], abs=1e-12)


def test_ranking_and_regression():
    c, r = t(1.0, 0.2), t(0.5, 0.4)
    swapped = preference_loss(r, c) - preference_loss(c, r)
    torch.testing.assert_close(swapped, c - r)
    torch.testing.assert_close(preference_loss(c + 3, r + 3), preference_loss(c, r))
    moved = preference_loss(c + 3, r + 3, center_coef=0.1)
    assert not torch.allclose(moved, preference_loss(c, r, center_coef=0.1))
    of_two = preference_loss(t(1.0), t(0.5)).item()
    assert ranking_loss(t(1.0, 0.5), [2, 1]).item() == pytest.approx(of_two, abs=1e-12)
    s = [0.3, -1.0, 2.0]  # ranked 2nd, 3rd, 1st
    want = math.log(sum(map(math.exp, s))) - s[2] + math.log(math.exp(s[0]) + math.exp(s[1])) - s[0]
    assert ranking_loss(t(*s), [5, 1, 9]).item() == pytest.approx(want, abs=1e-9)
    # Two best answers of the same score: each against the worst alone, and nothing between them.
    huge = ranking_loss(t(*s), [2**24, 1.0, 2**24 + 1.0]).item()
    assert huge == pytest.approx(want, abs=1e-9)  # no tie, as it were in float32
    tied = sum(ranking_loss(t(s[i], s[1]), [2, 1]).item() for i in (0, 2))
    rewards = t(*s).requires_grad_()
    loss = ranking_loss(rewards, [5, 1, 5])
    assert loss.item() == pytest.approx(tied, abs=1e-9)
    loss.backward()
    for i in (0, 2):
        wants = -1 / (1 + math.exp(s[i] - s[1]))
        assert rewards.grad[i].item() == pytest.approx(wants, abs=1e-9)
    cfg = Config(loss_type="regression")
    row = Preference([1], [[2], [3]], [0.5, 2.0])
    pair = row._replace(scores=None)
    assert row_loss(t(1.0, 1.0), row, cfg).item() == pytest.approx((0.25 + 1.0) / 2)
    assert row_loss(t(1.0, 1.0), pair, cfg).item() == pytest.approx((0 + 4.0) / 2)  # to +1 and -1
    with_margin = row_loss(t(1.0, 0.5), pair._replace(margin=0.3), Config())
    assert with_margin.item() == pytest.approx(0.5981389, abs=1e-6)


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_the_score_is_read_at_the_end_token_whatever_the_company(version):
    """Against the hidden state of each whole sequence, and other batch-mates; right padding never
    enters."""
    model = random_model(version)
    model.add_score()
    with torch.no_grad():
        model.score.weight.normal_()
    data = [
        ([5, 9, 3], [[4, 4, 0], [6, 2, 9, 0], [1, 0]]),
        ([7], [[3, 0], [8, 8, 0]]),
    ]
    hidden = []
    model.ln_out.register_forward_hook(lambda module, inputs, output: hidden.append(output))
    with torch.no_grad():
        together = score_answers(model, data, "cpu")
        for (prompt, answers), rewards in zip(data, together, strict=True):
            (alone,) = score_answers(model, [(prompt, answers)], "cpu")
            torch.testing.assert_close(rewards, alone, atol=1e-5, rtol=1e-5)
            for answer, reward in zip(answers, rewards.tolist(), strict=True):
                score, _ = model(torch.tensor([prompt + answer]), score=True)
                assert float(score) == pytest.approx(reward, abs=1e-4)
                model(torch.tensor([prompt + answer]))
                at_the_end = hidden[-1][0, -1] @ model.score.weight[0]
                assert float(at_the_end) == pytest.approx(reward, abs=1e-4)


# ----------------------------------------------------------------------------------------------
# runs


def pair(rng, kind):
    """A synthetic preference: the longer answer wins, or the one with more of the letter a."""

    def word(n):
        return "".join(rng.choice("abcd") for _ in range(n))

    while True:
        if kind == "longer":
            x, y = word(rng.randint(2, 8)), word(rng.randint(2, 8))
            a, b = len(x), len(y)
        else:
            x, y = word(6), word(6)
            a, b = x.count("a"), y.count("a")
        if a != b:
            chosen, rejected = (x, y) if a > b else (y, x)
            return {"prompt": f"{word(3)}: ", "chosen": chosen, "rejected": rejected}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder, rng = tmp_path_factory.mktemp("base"), random.Random(0)
    torch.manual_seed(0)
    model = RWKV(RWKVConfig("x070", 2, 64, 257))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    model.save_pretrained(folder / "base.pth")
    for kind in ("longer", "letter"):
        write(folder / f"{kind}.jsonl", *(pair(rng, kind) for _ in range(400)))
        write(folder / f"{kind}_val.jsonl", *(pair(rng, kind) for _ in range(200)))
    responses = {"responses": ["a" * n for n in (1, 4, 2)], "scores": [1, 4, 2]}
    write(folder / "kwise.jsonl", *({"prompt": f"p{i}", **responses} for i in range(8)))
    return folder


def tiny(base, out, **over):
    usual = dict(
        data=str(base / "longer.jsonl"),
        init_from=str(base / "base.pth"),
        tokenizer="bytes",
        out_dir=str(out),
        micro_bsz=8,
        global_bsz=8,
        lr=1e-3,
        lr_final=1e-4,
        warmup_steps=1,
        max_steps=4,
        eval_every=0,
        save_every=0,
        log_every=1,
        device="cpu",
        lora_r=4,
    )
    return Config(**{**usual, **over})


@pytest.mark.parametrize("kind", ["longer", "letter"])
def test_learns_a_rule(kind, base, tmp_path):
    val_data = base / f"{kind}_val.jsonl"
    cfg = tiny(
        base,
        tmp_path / kind,
        data=str(base / f"{kind}.jsonl"),
        val_data=str(val_data),
        micro_bsz=32,
        global_bsz=32,
        lr=3e-3,
        lr_final=3e-4,
        max_steps=100,
        log_every=25,
        center_coef=0.01,
    )
    train_reward.main(cfg)
    log = rows(tmp_path / kind)
    assert log[0]["val_accuracy"] == 0.0  # of a zero head: all are ties
    assert log[0]["val_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert log[-1]["val_accuracy"] > 0.95
    assert log[-1]["val_margin"] > 1
    assert log[-1]["val_std_reward"] > 0.5
    assert "val_accuracy_shorter" not in log[-1]  # the chosen one is never the shorter one here
    assert (tmp_path / kind / "rewards.png").stat().st_size > 5000

    pairs = [json.loads(line) for line in val_data.read_text().splitlines()]
    swapped = [{**p, "chosen": p["rejected"], "rejected": p["chosen"]} for p in pairs]
    write(tmp_path / "swapped.jsonl", *swapped)
    trained = str(tmp_path / kind / "rwkv-final.pth")
    over = dict(init_from=trained, val_data=str(tmp_path / "swapped.jsonl"), max_steps=0)
    train_reward.main(tiny(base, tmp_path / "s", **over))
    of_swapped = rows(tmp_path / "s")[0]
    assert of_swapped["val_accuracy"] == pytest.approx(1 - log[-1]["val_accuracy"])
    assert of_swapped["val_margin"] == pytest.approx(-log[-1]["val_margin"], rel=1e-4)
    assert ("val_accuracy_shorter" in of_swapped) == (kind == "longer")
    assert of_swapped.get("val_accuracy_shorter", 0.0) <= of_swapped["val_accuracy"]


def test_loss_does_not_depend_on_micro_batch_or_processes(base, tmp_path):
    over = dict(val_data=str(base / "letter_val.jsonl"))
    for name, micro_bsz in {"1x8": 8, "1x1": 1, "1x2": 2}.items():
        train_reward.main(tiny(base, tmp_path / name, micro_bsz=micro_bsz, **over))
    cfg = tiny(base, tmp_path / "2x2", micro_bsz=2, **over)
    done = torchrun("train_reward.py", cfg, nproc=2)
    assert done.returncode == 0, done.stderr
    keys = {"loss", "grad_norm", "val_loss", "val_margin", "val_std_reward"}
    for name in ("1x1", "1x2", "2x2"):
        for a, b in zip(rows(tmp_path / name), rows(tmp_path / "1x8"), strict=True):
            for key in b.keys() & keys:
                assert a[key] == pytest.approx(b[key], rel=2e-4, abs=1e-5), (name, a["step"], key)


FILES = {
    "full": "rwkv-final.pth",
    "lora": "lora-final.safetensors",
    "state": "state-final.pth",
    "head": "rwkv-final.pth",
}


@pytest.mark.parametrize("tune", list(FILES))
def test_what_it_writes_scores_the_same(tune, base, tmp_path):
    """Loaded by its path alone, and through --score."""
    group = (BYTES.encode("q: "), [[*BYTES.encode("abc"), 0], [*BYTES.encode("d"), 0]])
    in_training = []

    @torch.no_grad()
    def peek(model, tokenizer):
        in_training.append(score_answers(model, [group], "cpu")[0].tolist())
        return {}

    before = dict(base_weights(RWKV.from_pretrained(base / "base.pth")))
    train_reward.main(tiny(base, tmp_path / "run", tune=tune, lr=1e-2, eval_fn=peek, max_steps=6))
    expected = [pytest.approx(x, abs=1e-5) for x in in_training[-1]]

    path = str(tmp_path / "run" / FILES[tune])
    model, about = load_model(path)
    assert model.score is not None
    assert model.score.weight.dtype == torch.float32
    assert model.score.weight.any()
    after = {name: p for name, p in base_weights(model) if name != "score.weight"}
    moved = {name for name, p in after.items() if not torch.equal(p, before[name])}
    assert bool(moved) == (tune == "full")
    assert "head.weight" not in moved
    assert bool(about) == (tune in ("lora", "state"))

    write(
        tmp_path / "in.jsonl",
        {"prompt": "q: ", "completions": ["abc", "d"], "id": 7},
        {"prompt": "q: ", "completion": "d"},
    )
    train_reward.main(Config(score=str(tmp_path / "in.jsonl"), init_from=path, device="cpu"))
    scored = [json.loads(line) for line in (tmp_path / "in.scored.jsonl").read_text().splitlines()]
    assert scored[0]["scores"] == expected
    assert scored[0]["id"] == 7
    assert scored[1]["scores"] == expected[1:]
    if tune == "lora":
        merged = tmp_path / "m.pth"
        model_flag = f"--model={base / 'base.pth'}"
        export.main(["merge", model_flag, f"--adapter={path}", f"--out={merged}"])
        with torch.no_grad():
            (scores,) = score_answers(load_model(merged)[0], [group], "cpu")
        assert float(scores[0]) == pytest.approx(in_training[-1][0], abs=1e-4)


def test_score_names_the_row_that_it_cannot_read(base, tmp_path):
    train_reward.main(tiny(base, tmp_path / "run", max_steps=1))
    path = str(tmp_path / "run/rwkv-final.pth")
    for bad, words in (
        ({"prompt": "q: "}, "in.jsonl:2: expected a completion"),
        ({"prompt": "q: ", "completions": "d"}, 'in.jsonl:2: "completions" is a list'),
        ({"prompt": "", "completion": "d"}, 'in.jsonl:2: "prompt" is missing or empty'),
    ):
        write(tmp_path / "in.jsonl", {"prompt": "q: ", "completion": "d"}, bad)
        with pytest.raises(UserError, match=words):
            train_reward.main(
                Config(score=str(tmp_path / "in.jsonl"), init_from=path, device="cpu")
            )
        assert not (tmp_path / "in.scored.jsonl").exists()
    some = [{"text": "d"}, {"text": ""}, {"text": "e"}]  # as sample.py batch writes them
    write(
        tmp_path / "b.jsonl",
        {"prompt": "q: ", "completions": some},
        {"prompt": "q", "completion": " "},
    )
    train_reward.main(Config(score=str(tmp_path / "b.jsonl"), init_from=path, device="cpu"))
    lines = (tmp_path / "b.scored.jsonl").read_text().splitlines()
    first, second = (json.loads(line)["scores"] for line in lines)
    assert [score is None for score in first] == [False, True, False] and second == [None]
    cfg = Config(score=str(tmp_path / "in.jsonl"), init_from=path, device="cpu", skip_bad=True)
    train_reward.main(cfg)  # --skip_bad leaves such rows out
    assert (tmp_path / "in.scored.jsonl").read_text().count("scores") == 1


def test_an_eval_fn_may_call_its_number_accuracy(base, tmp_path):
    """As the training's own is called, which it then stands for in that line."""
    cfg = tiny(base, tmp_path / "run", max_steps=1, eval_fn=lambda *args: {"accuracy": 0.25})
    train_reward.main(cfg)
    assert [row["accuracy"] for row in rows(tmp_path / "run")] == [0.25, 0.25]


def test_kwise_rows_and_regression_run(base, tmp_path):
    kwise = str(base / "kwise.jsonl")
    train_reward.main(tiny(base, tmp_path / "k", data=kwise, val_data=kwise, max_steps=40, lr=3e-3))
    assert rows(tmp_path / "k")[-1]["val_accuracy"] == 1.0
    over = dict(data=kwise, loss_type="regression", max_steps=60, lr=1e-2)
    train_reward.main(tiny(base, tmp_path / "r", **over))
    model, _ = load_model(tmp_path / "r/rwkv-final.pth")
    row = read_preferences(kwise, BYTES, 100)[0]
    (scores,) = score_answers(model, [(row.prompt, row.answers)], "cpu")
    assert scores.tolist() == [pytest.approx(x, abs=0.7) for x in (1, 4, 2)]


def test_resume_is_bit_for_bit(base, tmp_path):
    over = dict(
        tune="state",
        val_data=str(base / "letter_val.jsonl"),
        eval_every=2,
        save_every=2,
        max_steps=6,
    )
    train_reward.main(tiny(base, tmp_path / "whole", **over))
    kill_after(tiny(base, tmp_path / "parts", **over), 3, train_reward.main)
    train_reward.main(tiny(base, tmp_path / "parts", **over, resume=True))
    a, b = (torch.load(tmp_path / x / "last.pt", weights_only=True) for x in ("whole", "parts"))
    assert a["best_loss"] == b["best_loss"] < math.inf
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert "score.weight" in a["model"]


@pytest.mark.parametrize(
    "over, words",
    [
        (dict(init_from=""), "which model"),
        (dict(score="no.jsonl", init_from=""), "which reward model"),
        (dict(score="no.jsonl"), "has no score.weight"),
        (dict(data="no.jsonl"), "no.jsonl does not exist"),
    ],
)
def test_bad_input(over, words, base, tmp_path):
    with pytest.raises(UserError, match=words):
        train_reward.main(tiny(base, tmp_path / "run", **over))
