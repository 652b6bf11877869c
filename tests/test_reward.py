"""train_reward.py: losses by hand, the score does not depend on how it is run, what it learns, what it writes."""

import json
import math
import os
import random
import subprocess
import sys

import pytest
import torch

import common
import export
import prepare
import train_reward
from common import UserError
from conftest import ROOT
from model import RWKV, RWKVConfig, load_model
from prepare import Preference
from test_model import random_model
from test_pretrain import kill_after
from test_sft import rows, write
from train_reward import Config, preference_loss, ranking_loss, rewards_of, row_loss

BYTES = prepare.load_tokenizer("bytes")
t = lambda *x: torch.tensor(x, dtype=torch.float64)  # noqa: E731


def test_losses_by_hand():
    c, r = t(1.0, 0.2, -3.0), t(0.5, 0.4, 1.0)
    for margin, coef in ((None, 0.0), (t(0.3, 0.0, 1.0), 0.0), (t(0.1, 0.2, 0.3), 0.01)):
        got = preference_loss(c, r, margin=margin, center_coef=coef)
        for i in range(3):
            m = 0.0 if margin is None else float(margin[i])
            want = (
                math.log(1 + math.exp(-(float(c[i]) - float(r[i]) - m)))
                + coef * (float(c[i]) + float(r[i])) ** 2
            )
            assert got[i].item() == pytest.approx(want, abs=1e-9)
    # log(1 + exp(-0.5)) = 0.4740770; with margin 0.3: log(1 + exp(-0.2)) = 0.5981389; centred: + 0.01 * 1.5^2
    assert preference_loss(t(1.0), t(0.5)).item() == pytest.approx(0.4740770, abs=1e-6)
    assert preference_loss(t(1.0), t(0.5), margin=t(0.3), center_coef=0.01).item() == pytest.approx(
        0.5981389 + 0.0225, abs=1e-6
    )
    c.requires_grad_()
    preference_loss(c, r).sum().backward()
    assert c.grad.tolist() == [
        pytest.approx(-1 / (1 + math.exp(float(a - b)))) for a, b in zip(c.detach(), r)
    ]


def test_ranking_and_regression():
    """Check 16."""
    c, r = t(1.0, 0.2), t(0.5, 0.4)
    swapped = preference_loss(r, c) - preference_loss(c, r)
    torch.testing.assert_close(swapped, c - r)
    torch.testing.assert_close(preference_loss(c + 3, r + 3), preference_loss(c, r))
    assert not torch.allclose(
        preference_loss(c + 3, r + 3, center_coef=0.1), preference_loss(c, r, center_coef=0.1)
    )
    assert ranking_loss(t(1.0, 0.5), [2, 1]).item() == pytest.approx(
        preference_loss(t(1.0), t(0.5)).item(), abs=1e-12
    )
    s = [0.3, -1.0, 2.0]  # ranked 2nd, 3rd, 1st
    want = math.log(sum(map(math.exp, s))) - s[2] + math.log(math.exp(s[0]) + math.exp(s[1])) - s[0]
    assert ranking_loss(t(*s), [5, 1, 9]).item() == pytest.approx(want, abs=1e-9)
    cfg = Config(loss_type="regression")
    row = Preference([1], [[2], [3]], [0.5, 2.0])
    assert row_loss(t(1.0, 1.0), row, cfg).item() == pytest.approx((0.25 + 1.0) / 2)
    assert row_loss(t(1.0, 1.0), row._replace(scores=None), cfg).item() == pytest.approx(
        (0 + 4.0) / 2
    )  # to +1 and -1
    assert row_loss(
        t(1.0, 0.5), row._replace(scores=None, margin=0.3), Config()
    ).item() == pytest.approx(0.5981389, abs=1e-6)


@pytest.mark.parametrize("version", ["x060", "x070"])
def test_the_score_is_read_at_the_end_token_whatever_the_company(version):
    """Against the hidden state of each whole sequence, and other batch-mates; right padding never enters."""
    model = random_model(version)
    model.add_score()
    with torch.no_grad():
        model.score.weight.normal_()
    data = [
        Preference([5, 9, 3], [[4, 4, 0], [6, 2, 9, 0], [1, 0]], [1, 2, 3]),
        Preference([7], [[3, 0], [8, 8, 0]], None),
    ]
    with torch.no_grad():
        together = rewards_of(model, data, "cpu")
        for row, rewards in zip(data, together):
            alone = rewards_of(model, [row], "cpu")[0]
            torch.testing.assert_close(rewards, alone, atol=1e-5, rtol=1e-5)
            for answer, reward in zip(row.answers, rewards):
                score, _ = model(torch.tensor([row.prompt + answer]), score=True)
                assert float(score) == pytest.approx(float(reward), abs=1e-4)
                hidden = []
                hook = model.ln_out.register_forward_hook(lambda m, i, o: hidden.append(o))
                model(torch.tensor([row.prompt + answer]))
                hook.remove()
                assert float(hidden[0][0, -1] @ model.score.weight[0]) == pytest.approx(
                    float(reward), abs=1e-4
                )


# ---------------------------------------------------------------------------------------------------------------------
# runs


def pair(rng, kind):
    """A synthetic preference: the longer answer wins, or the one with more of the letter a."""
    word = lambda n: "".join(rng.choice("abcd") for _ in range(n))  # noqa: E731
    while True:
        x, y = (
            (word(rng.randint(2, 8)), word(rng.randint(2, 8)))
            if kind == "longer"
            else (word(6), word(6))
        )
        a, b = (len(x), len(y)) if kind == "longer" else (x.count("a"), y.count("a"))
        if a != b:
            return {
                "prompt": f"{word(3)}: ",
                "chosen": x if a > b else y,
                "rejected": y if a > b else x,
            }


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
    write(
        folder / "kwise.jsonl",
        *(
            {"prompt": f"p{i}", "responses": ["a" * n for n in (1, 4, 2)], "scores": [1, 4, 2]}
            for i in range(8)
        ),
    )
    return folder


def tiny(base, out, **over):
    return Config(
        **{
            **dict(
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
            ),
            **over,
        }
    )


@pytest.mark.parametrize("kind", ["longer", "letter"])
def test_learns_a_rule(kind, base, tmp_path):
    """Check 26."""
    train_reward.main(
        tiny(
            base,
            tmp_path / kind,
            data=str(base / f"{kind}.jsonl"),
            val_data=str(base / f"{kind}_val.jsonl"),
            micro_bsz=32,
            global_bsz=32,
            lr=3e-3,
            lr_final=3e-4,
            max_steps=100,
            log_every=25,
            center_coef=0.01,
        )
    )
    log = rows(tmp_path / kind)
    assert log[0]["val_accuracy"] == 0.0 and log[0]["val_loss"] == pytest.approx(
        math.log(2), abs=1e-6
    )  # a zero head: all ties
    assert (
        log[-1]["val_accuracy"] > 0.95
        and log[-1]["val_margin"] > 1
        and log[-1]["val_std_reward"] > 0.5
    )
    assert "val_accuracy_shorter" not in log[-1]  # the chosen one is never the shorter one here
    swapped = [
        {**row, "chosen": row["rejected"], "rejected": row["chosen"]}
        for row in map(json.loads, open(base / f"{kind}_val.jsonl"))
    ]
    write(tmp_path / "swapped.jsonl", *swapped)
    train_reward.main(
        tiny(
            base,
            tmp_path / "s",
            init_from=str(tmp_path / kind / "rwkv-final.pth"),
            val_data=str(tmp_path / "swapped.jsonl"),
            max_steps=0,
        )
    )
    now = rows(tmp_path / "s")[0]
    assert now["val_accuracy"] == pytest.approx(1 - log[-1]["val_accuracy"]) and now[
        "val_margin"
    ] == pytest.approx(-log[-1]["val_margin"], rel=1e-4)
    assert ("val_accuracy_shorter" in now) == (kind == "longer") and now.get(
        "val_accuracy_shorter", 0.0
    ) <= now["val_accuracy"]
    assert (tmp_path / kind / "rewards.png").stat().st_size > 5000


def test_loss_does_not_depend_on_micro_batch_or_processes(base, tmp_path):
    over = dict(val_data=str(base / "letter_val.jsonl"))
    for name, more in {"1x8": {}, "1x1": dict(micro_bsz=1), "1x2": dict(micro_bsz=2)}.items():
        train_reward.main(tiny(base, tmp_path / name, **over, **more))
    cfg = tiny(base, tmp_path / "2x2", micro_bsz=2, **over)
    flags = [f"--{f}={v}" for f, v in common.config_dict(cfg).items() if v not in (None, "()", "")]
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--nproc_per_node=2",
            "--master_port",
            str(29500 + os.getpid() % 1000),
            "--",
            "train_reward.py",
            *flags,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for name in ("1x1", "1x2", "2x2"):
        for a, b in zip(rows(tmp_path / name), rows(tmp_path / "1x8"), strict=True):
            for key in b.keys() & {"loss", "grad_norm", "val_loss", "val_margin", "val_std_reward"}:
                assert a[key] == pytest.approx(b[key], rel=2e-4, abs=1e-5), (name, a["step"], key)


@pytest.mark.parametrize(
    "tune, file",
    [
        ("full", "rwkv-final.pth"),
        ("lora", "lora-final.safetensors"),
        ("state", "state-final.pth"),
        ("head", "rwkv-final.pth"),
    ],
)
def test_what_it_writes_scores_the_same(tune, file, base, tmp_path):
    """Loaded by its path alone, and through --score."""
    got = {}

    def peek(model, tokenizer):
        got["scores"] = rewards_of(
            model,
            [
                Preference(
                    BYTES.encode("q: "), [[*BYTES.encode("abc"), 0], [*BYTES.encode("d"), 0]], None
                )
            ],
            "cpu",
        )[0].tolist()
        return {}

    before = RWKV.from_pretrained(base / "base.pth")
    train_reward.main(
        tiny(base, tmp_path / "run", tune=tune, lr=1e-2, eval_fn=torch.no_grad()(peek), max_steps=6)
    )
    model, about = load_model(tmp_path / "run" / file)
    assert (
        model.score is not None
        and model.score.weight.dtype == torch.float32
        and model.score.weight.any()
    )
    moved = {
        n
        for n, p in model.base_weights()
        if n != "score.weight" and not torch.equal(p, dict(before.base_weights())[n])
    }
    assert bool(moved) == (tune == "full") and "head.weight" not in moved
    assert bool(about) == (tune in ("lora", "state"))
    write(
        tmp_path / "in.jsonl",
        {"prompt": "q: ", "completions": ["abc", "d"], "id": 7},
        {"prompt": "q: ", "completion": "d"},
    )
    train_reward.main(
        Config(
            score=str(tmp_path / "in.jsonl"), init_from=str(tmp_path / "run" / file), device="cpu"
        )
    )  # it says its tokenizer
    scored = [json.loads(line) for line in (tmp_path / "in.scored.jsonl").read_text().splitlines()]
    assert (
        scored[0]["scores"] == [pytest.approx(x, abs=1e-5) for x in got["scores"]]
        and scored[0]["id"] == 7
    )
    assert scored[1]["scores"] == [pytest.approx(got["scores"][1], abs=1e-5)]
    if tune == "lora":
        export.main(
            [
                "merge",
                f"--model={base / 'base.pth'}",
                f"--adapter={tmp_path / 'run' / file}",
                f"--out={tmp_path / 'm.pth'}",
            ]
        )
        merged, _ = load_model(tmp_path / "m.pth")
        data = [Preference(BYTES.encode("q: "), [[*BYTES.encode("abc"), 0]], None)]
        with torch.no_grad():
            assert float(rewards_of(merged, data, "cpu")[0]) == pytest.approx(
                got["scores"][0], abs=1e-4
            )


def test_kwise_rows_and_regression_run(base, tmp_path):
    train_reward.main(
        tiny(
            base,
            tmp_path / "k",
            data=str(base / "kwise.jsonl"),
            val_data=str(base / "kwise.jsonl"),
            max_steps=40,
            lr=3e-3,
        )
    )
    assert rows(tmp_path / "k")[-1]["val_accuracy"] == 1.0
    train_reward.main(
        tiny(
            base,
            tmp_path / "r",
            data=str(base / "kwise.jsonl"),
            loss_type="regression",
            max_steps=60,
            lr=1e-2,
        )
    )
    model, _ = load_model(tmp_path / "r/rwkv-final.pth")
    data = prepare.read_preferences(base / "kwise.jsonl", BYTES, 100)
    assert rewards_of(model, data[:1], "cpu")[0].tolist() == [
        pytest.approx(x, abs=0.7) for x in (1, 4, 2)
    ]


def test_resume_is_bit_for_bit(base, tmp_path):
    over = dict(
        tune="state",
        val_data=str(base / "letter_val.jsonl"),
        eval_every=2,
        save_every=2,
        max_steps=6,
    )
    whole, parts = (tiny(base, tmp_path / name, **over) for name in ("whole", "parts"))
    train_reward.main(whole)
    kill_after(parts, 3, train_reward.main)
    train_reward.main(tiny(base, tmp_path / "parts", **over, resume=True))
    a, b = (
        torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts")
    )
    assert (
        a["best"] == b["best"]
        and all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
        and "score.weight" in a["model"]
    )


@pytest.mark.parametrize(
    "over, words",
    [
        (dict(init_from=""), "which model"),
        (dict(score="no.jsonl"), "has no score.weight"),
        (dict(data="no.jsonl"), "no.jsonl does not exist"),
    ],
)
def test_bad_input(over, words, base, tmp_path):
    with pytest.raises(UserError, match=words):
        train_reward.main(tiny(base, tmp_path / "run", **over))
