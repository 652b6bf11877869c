"""train_grpo.py and config/rewards.py: losses and advantages by hand, gradients, what it learns,
the same numbers however it is run."""

import copy
import dataclasses
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import time

import train_grpo
import train_reward
from config import rewards as kit
from gosling import config
from gosling.batch import fork, score_forks
from gosling.config import UserError
from gosling.rollouts import combine_rewards
from gosling.runs import shuffled
from gosling.tokenizer import load_tokenizer
from gosling.tune import load_model
from model import RWKV, RWKVConfig
from train_grpo import Config, group_advantages, grpo_loss, policy_loss

import pytest
import torch
from helpers import (
    GROUPS,
    LP,
    MASK,
    OLD,
    REDUCTIONS,
    REF,
    ROOT,
    SAID,
    A,
    kill_after,
    random_model,
    rows,
    torchrun,
    trained_gradient,
    tune,
    write,
)

BYTES = load_tokenizer("bytes")


def t(*x):
    return torch.tensor(x, dtype=torch.float64)


# ----------------------------------------------------------------------------------------------
# the loss by hand: 5 rows of up to 6 tokens, one masked whole, one with a hole


def by_hand(
    lp,
    a=A,
    mask=MASK,
    old=OLD,
    *,
    loss_type,
    level="token",
    epsilon=0.2,
    high=None,
    delta=None,
    beta=0.0,
    estimator="k3",
    ref=None,
    said=None,
    cap=3.0,
    longest=7,
    held=None,
):
    """Loops over plain floats. held: the log-probabilities whose ratio cispo holds fixed."""
    lp, old, held = (
        [[float(v) for v in row] for row in x] for x in (lp, old, lp if held is None else held)
    )
    per_row = []
    for i, row in enumerate(lp):
        at, values = [j for j in range(len(row)) if mask[i][j]], []
        for j in at:
            now = held if loss_type == "cispo" else lp
            r = math.exp(
                now[i][j] - old[i][j]
                if level == "token"
                else sum(now[i][k] - old[i][k] for k in at) / len(at)
            )
            if loss_type == "cispo":
                value = -min(r, high) * a[i] * lp[i][j]
            else:
                up = 1 + (epsilon if high is None else high)
                value = -min(
                    (r if delta is None else min(r, delta)) * a[i],
                    min(max(r, 1 - epsilon), up) * a[i],
                )
            if said is not None:
                value *= min(math.exp(old[i][j] - float(said[i][j])), cap)
            if ref is not None:
                d = lp[i][j] - float(ref[i][j])
                value += beta * {"k1": d, "k2": d * d / 2, "k3": math.exp(-d) + d - 1}[estimator]
            values.append(value)
        per_row.append(values)
    n, total = sum(map(len, per_row)), sum(map(sum, per_row))
    return {
        "grpo": sum(sum(v) / max(len(v), 1) for v in per_row) / len(per_row),
        "dr_grpo": total / (len(per_row) * longest),
    }.get(loss_type, total / max(n, 1))


def loss_and_gradient(
    lp,
    a=A,
    mask=MASK,
    old=OLD,
    *,
    loss_type,
    level="token",
    high=None,
    estimator="k3",
    ref=None,
    said=None,
    cap=3.0,
    **more,
):
    x = torch.as_tensor(lp).clone().requires_grad_()
    loss, metrics = policy_loss(
        x,
        old,
        torch.as_tensor(a, dtype=x.dtype),
        torch.as_tensor(mask),
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_high=high,
        kl_estimator=estimator,
        ref_logps=ref,
        sampling_logps=said,
        importance_cap=cap,
        max_new_tokens=7,
        **more,
    )
    return float(loss.detach()), torch.autograd.grad(loss, x)[0], metrics


OPTIONS = {
    "plain": {},
    "delta": dict(delta=1.4),
    "high": dict(high=0.28),
    "wide": dict(epsilon=0.05, high=0.6, delta=1.7),
    **{k: dict(beta=0.3, estimator=k, ref=REF) for k in ("k1", "k2", "k3")},
    "importance": dict(said=SAID, cap=1.5),
    "all": dict(delta=1.5, high=0.4, said=SAID, cap=1.3, beta=0.2, ref=REF),
}


@pytest.mark.parametrize("loss_type", REDUCTIONS)
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_losses_and_gradients_by_hand(loss_type, level):
    seen = []
    for name, options in OPTIONS.items():
        options = {**options, "loss_type": loss_type, "level": level}
        if loss_type == "cispo":
            options.update(
                high=options.get("high", 0.6) + 0.6
            )  # an absolute cap, active on some tokens
        got, gradient, _ = loss_and_gradient(LP, **options)
        assert got == pytest.approx(by_hand(LP, **options), abs=1e-9), name
        for i, j in itertools.product(range(5), range(6)):
            up, down = LP.clone(), LP.clone()
            up[i, j] += 1e-6
            down[i, j] -= 1e-6
            slope = (by_hand(up, held=LP, **options) - by_hand(down, held=LP, **options)) / 2e-6
            assert gradient[i, j].item() == pytest.approx(slope, abs=1e-7), (name, i, j)
        seen.append(got)
    if level == "token":
        names = [
            n for n in OPTIONS if loss_type != "cispo" or n not in ("delta", "wide")
        ]  # cispo has a cap already, and no bound below
        seen = [x for x, n in zip(seen, OPTIONS, strict=False) if n in names]
        assert all(abs(x - y) > 1e-6 for x, y in itertools.combinations(seen, 2)), dict(
            zip(names, seen, strict=False)
        )


def test_numbers_that_can_be_checked_on_paper():
    # one row, ratios 2 and 1/2. A = 1: min(2, 1.2) + min(0.5, 0.8) = 1.7; A = -1: -(2 + 0.8) =
    # -2.8, with delta 1.5 -(1.5 + 0.8)
    lp, old, m = t([math.log(2), 0]), t([0, math.log(2)]), torch.ones(1, 2)
    for a, more, want in (
        (1, {}, -1.7),
        (-1, {}, 2.8),
        (-1, dict(delta=1.5), 2.3),
        (1, dict(epsilon_high=0.5), -2.0),
    ):
        assert policy_loss(lp, old, t(a), m, **more)[0].item() == pytest.approx(want / 2)
    assert policy_loss(lp, old, t(1), m, loss_type="cispo", epsilon_high=1.5)[
        0
    ].item() == pytest.approx(-1.5 * math.log(2) / 2)
    got, metrics = policy_loss(lp, old, t(1), m)
    assert metrics == pytest.approx(
        {
            "ratio": 1.25,
            "clip_ratio/low_mean": 0,
            "clip_ratio/high_mean": 0.5,
            "clip_ratio/region_mean": 0.5,
        }
    )
    assert policy_loss(lp, old, t(-1), m)[1]["clip_ratio/low_mean"] == 0.5
    assert policy_loss(lp, old, t(1), m, loss_type="cispo", epsilon_high=1.5)[1] == pytest.approx(
        {"ratio": 1.25, "cispo_clip_ratio": 0.5}
    )
    # rewards 0 and 1: mean 1/2, std with ddof 1 sqrt(1/2); 3 and 6, 9: std 3
    assert group_advantages(t(0, 1), 2).tolist() == pytest.approx(
        [-0.5 / (math.sqrt(0.5) + 1e-4), 0.5 / (math.sqrt(0.5) + 1e-4)], abs=1e-12
    )
    assert group_advantages(t(3, 6, 9), 3).tolist() == pytest.approx(
        [-3 / 3.0001, 0, 3 / 3.0001], abs=1e-12
    )


@pytest.mark.parametrize("loss_type", REDUCTIONS[:4])
@pytest.mark.parametrize("old", [None, LP])
def test_on_policy(loss_type, old):
    """The loss is the mean of -A, its gradient -A m / norm."""
    loss, gradient, metrics = loss_and_gradient(LP, old=old, loss_type=loss_type)
    lengths = [sum(row) for row in MASK]
    norm = [{"grpo": 5 * max(n, 1), "dr_grpo": 5 * 7}.get(loss_type, sum(lengths)) for n in lengths]
    want = [[-A[i] * MASK[i][j] / norm[i] for j in range(6)] for i in range(5)]
    assert loss == pytest.approx(sum(map(sum, want)), abs=1e-12)
    assert torch.allclose(gradient, t(*want), atol=1e-12)
    assert metrics["ratio"] == 1 and metrics["clip_ratio/region_mean"] == 0


@pytest.mark.parametrize("loss_type", REDUCTIONS)
@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("garbage", [math.nan, math.inf, -1e9, 1e9])
def test_what_is_masked_does_not_matter(loss_type, level, garbage):
    """NaN, infinity and large numbers where the mask is 0, and a mask that is 0 everywhere."""
    here, options = (
        torch.tensor(MASK).bool(),
        dict(beta=0.2, high=0.5, loss_type=loss_type, level=level, cap=1.5),
    )

    def dirt(x):
        return torch.where(here, x, garbage)

    want, want_gradient, want_metrics = loss_and_gradient(
        LP, ref=REF, said=SAID, entropy=-LP, **options
    )
    loss, gradient, metrics = loss_and_gradient(
        dirt(LP), old=dirt(OLD), ref=dirt(REF), said=dirt(SAID), entropy=dirt(-LP), **options
    )
    assert loss == want and torch.equal(gradient, want_gradient) and metrics == want_metrics
    assert not gradient[~here].any() and gradient[here].abs().min() >= 0
    empty = torch.zeros(5, 6)
    for x in (LP, torch.full_like(LP, garbage)):
        loss, gradient, metrics = loss_and_gradient(x, mask=empty, old=x, ref=x, said=x, **options)
        assert loss == 0 and not gradient.any() and not any(metrics.values())


def test_the_plain_loss_is_the_default():
    """grpo_loss, which is there to be copied, and policy_loss as it is by default."""
    mask, advantages = torch.tensor(MASK), torch.tensor(A, dtype=torch.float64)
    plain = LP.clone().requires_grad_()
    loss = grpo_loss(plain, OLD, advantages, mask)
    want, want_gradient, _ = loss_and_gradient(LP, loss_type="dapo")
    assert loss.item() == pytest.approx(want, rel=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, plain)[0], want_gradient)


def test_reductions_are_four_and_coincide_on_equal_rows():
    """And row 2, which is masked whole: counted in grpo and dr_grpo, not seen in dapo and bnpo."""
    got = {k: loss_and_gradient(LP, loss_type=k)[0] for k in REDUCTIONS[:4]}
    assert (
        got["dapo"] == pytest.approx(got["bnpo"]) and len({round(x, 6) for x in got.values()}) == 3
    )
    halves = {
        k: sum(
            loss_and_gradient(
                LP[part], A[part], MASK[part], OLD[part], loss_type=k, num_items=13, num_rows=5
            )[0]
            for part in (slice(0, 2), slice(2, 5))
        )
        for k in REDUCTIONS[:4]
    }
    assert (
        len({round(x, 6) for x in halves.values()}) == 4
        and abs(halves["bnpo"] - got["bnpo"]) > 1e-3
    )
    full = torch.ones(5, 7)
    wide = [torch.cat([x, x[:, :1]], 1) for x in (LP, OLD)]
    equal = [
        loss_and_gradient(wide[0], mask=full, old=wide[1], loss_type=k)[0] for k in REDUCTIONS[:4]
    ]
    assert equal == pytest.approx([equal[0]] * 4, abs=1e-12)
    there = [0, 1, 3, 4]
    without = {
        k: loss_and_gradient(
            LP[there], [A[i] for i in there], [MASK[i] for i in there], OLD[there], loss_type=k
        )[0]
        for k in REDUCTIONS[:4]
    }
    for k, factor in (("grpo", 4 / 5), ("dr_grpo", 4 / 5), ("dapo", 1), ("bnpo", 1)):
        assert got[k] == pytest.approx(without[k] * factor, abs=1e-12)


@pytest.mark.parametrize("loss_type", ["grpo", "dr_grpo", "dapo", "cispo"])
@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("world", [1, 2])
def test_sums_over_parts_are_the_whole(loss_type, size, world):
    """In float32; two processes: each has its share of the counts, and gradients are averaged."""
    options = dict(loss_type=loss_type, high=0.9, beta=0.1)
    lp, old, ref = [x[[0, 1, 2, 3, 4, 0, 3, 1]].float() for x in (LP, OLD, REF)]
    a, mask = [A[i] for i in (0, 1, 2, 3, 4, 3, 0, 2)], [MASK[i] for i in (0, 1, 2, 3, 4, 0, 3, 1)]
    want, want_gradient, want_metrics = loss_and_gradient(lp, a, mask, old, ref=ref, **options)
    n, loss, gradient, metrics = (
        sum(map(sum, mask)),
        0.0,
        torch.zeros_like(lp),
        dict.fromkeys(want_metrics, 0.0),
    )
    for i in range(0, 8, size):
        part = slice(i, i + size)
        x, gradient[part], m = loss_and_gradient(
            lp[part],
            a[part],
            mask[part],
            old[part],
            ref=ref[part],
            num_items=n / world,
            num_rows=8 / world,
            **options,
        )
        loss, metrics = loss + x / world, {k: metrics[k] + v / world for k, v in m.items()}
    assert loss == pytest.approx(want, abs=1e-6) and torch.allclose(
        gradient / world, want_gradient, atol=1e-6
    )
    assert metrics == pytest.approx(want_metrics, abs=1e-6)


def test_dual_clip_and_epsilon_high_and_sequences():
    """Dual clip's largest ratio, epsilon_high, and one ratio for a sequence."""
    lp, old, m = t([math.log(4.0)], [math.log(4.0)]), t([0.0], [0.0]), torch.ones(2, 1)
    for delta, want in (
        (None, 4.0),
        (3.0, 0.0),
    ):  # d/dlp of 4 = exp(lp), halved; the row with A > 0 is clipped at 1.2 anyway
        gradient = loss_and_gradient(lp, [-1.0, 1.0], m, old, loss_type="dapo", delta=delta)[1]
        assert gradient.flatten().tolist() == pytest.approx([want / 2, 0.0])
    inside = [
        loss_and_gradient(t([0.1]), [1.0], m[:1], t([0.0]), loss_type="dapo", delta=d)[:2]
        for d in (None, 3.0)
    ]
    assert inside[0] == inside[1] and inside[0][1].item() == pytest.approx(-math.exp(0.1))
    none, same = (loss_and_gradient(LP, loss_type="dapo", high=h) for h in (None, 0.2))
    assert none[0] == same[0] and torch.equal(none[1], same[1])
    moved = (loss_and_gradient(LP, loss_type="dapo", high=0.5)[1] - none[1]).abs().sum(1)
    assert not moved[[1, 3]].any() and moved[0] > 0
    order = [3, 1, 5, 0, 4, 2]
    for level, differs in (("sequence", False), ("token", True)):
        # with a permuted old policy alone: a row's mean is the same, the tokens' own ratios are not
        mask = torch.ones(5, 6)
        a, b = (
            loss_and_gradient(LP, mask=mask, old=old, loss_type="grpo", level=level)[0]
            for old in (OLD, OLD[:, order])
        )
        assert (abs(a - b) > 1e-6) is differs
        a, b = (
            loss_and_gradient(LP[:, o], mask=mask, old=OLD[:, o], loss_type="grpo", level=level)[0]
            for o in (list(range(6)), order)
        )
        assert a == pytest.approx(b, abs=1e-12)
    one = [
        loss_and_gradient(LP[:, :1], mask=[[1]] * 5, old=OLD[:, :1], loss_type="grpo", level=level)
        for level in ("token", "sequence")
    ]
    assert one[0][0] == pytest.approx(one[1][0], abs=1e-12) and torch.allclose(one[0][1], one[1][1])


def test_kl_terms():
    """k3 is not multiplied by the ratio: another old policy changes nothing in it."""
    zero, options = [0.0] * 5, dict(loss_type="dapo", beta=1.0, ref=REF)
    for estimator in ("k1", "k2", "k3"):
        a, b = (
            loss_and_gradient(LP, zero, old=old, estimator=estimator, **options)
            for old in (OLD, LP)
        )
        assert a[0] == pytest.approx(b[0]) and torch.allclose(a[1], b[1])
        assert a[2]["kl"] == pytest.approx(a[0])
        at = loss_and_gradient(LP, zero, estimator=estimator, **{**options, "ref": LP})
        assert at[0] == 0 and at[2]["kl"] == 0 and bool(at[1].any()) is (estimator == "k1")
    assert policy_loss(
        LP[:1, :1], None, t(0), torch.ones(1, 1), beta=1.0, ref_logps=LP[:1, :1] + 1
    )[0].item() == pytest.approx(math.e - 2)
    assert policy_loss(
        LP[:1, :1],
        None,
        t(0),
        torch.ones(1, 1),
        beta=1.0,
        ref_logps=LP[:1, :1] + 1,
        kl_estimator="k1",
    )[0].item() == pytest.approx(-1)
    for i, j in itertools.product(range(5), range(6)):
        assert (
            policy_loss(
                LP[i : i + 1, j : j + 1],
                None,
                t(0),
                torch.ones(1, 1),
                beta=1.0,
                ref_logps=REF[i : i + 1, j : j + 1],
            )[0]
            > 0
        )
    assert "kl" not in loss_and_gradient(LP, loss_type="dapo", ref=REF)[2]


def advantages_by_hand(rewards, G, scale):
    out, every = [], [r for r in rewards if not math.isnan(r)]

    def spread(x):
        if len(x) < 2:
            return 0.0
        return math.sqrt(sum((r - sum(x) / len(x)) ** 2 for r in x) / (len(x) - 1))

    for i in range(0, len(rewards), G):
        there = [r for r in rewards[i : i + G] if not math.isnan(r)]
        by = {"group": spread(there) + 1e-4, "batch": spread(every) + 1e-4, "none": 1.0}[scale]
        out += [
            0.0 if math.isnan(r) else (r - sum(there) / len(there)) / by for r in rewards[i : i + G]
        ]
    return out


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_advantages(scale):
    """By hand, with missing rewards and groups whose rewards are all equal."""
    nan = math.nan
    rewards = [
        0.0,
        1.0,
        0.5,
        2.0,
        nan,
        1.0,
        -1.0,
        4.0,
        nan,
        nan,
        3.0,
        nan,
        nan,
        nan,
        nan,
        nan,
        0.001,
        0.002,
        0.001,
        0.003,
    ]
    got = group_advantages(t(*rewards), 4, scale_rewards=scale)
    assert got.tolist() == pytest.approx(advantages_by_hand(rewards, 4, scale), abs=1e-9)
    assert not got[8:16].any() and got[4] == 0 and not got.isnan().any()
    dead = group_advantages(t(*[0.1] * 6, 0.0, 0.3, 0.1), 3, scale_rewards=scale)
    assert not dead[:6].any() and dead[6:].all()
    if scale != "batch":
        moved = group_advantages(
            t(*rewards) + torch.tensor([5.0] * 4 + [0.0] * 16), 4, scale_rewards=scale
        )
        assert torch.allclose(moved, got, atol=1e-9)
    with pytest.raises(ValueError, match="expected group, batch or none"):
        group_advantages(t(0, 1), 2, scale_rewards="std")


def test_several_rewards():
    got = combine_rewards([[1.0, None, None, 2], [10, 20.0, None, None]], [0.5, 2.0])
    assert got[[0, 1, 3]].tolist() == [20.5, 40.0, 1.0] and got[2].isnan()


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(loss_type="cispo"), "give it, about 5"),
        (dict(loss_type="dr_grpo"), "give max_new_tokens"),
        (dict(loss_type="sapo"), "no such variant"),
        (dict(importance_sampling_level="row"), "no such variant"),
    ],
)
def test_what_does_not_go_together(bad, words):
    with pytest.raises(ValueError, match=words):
        policy_loss(LP, OLD, t(*A), torch.tensor(MASK), **bad)


# ----------------------------------------------------------------------------------------------
# config/rewards.py


def test_overlong_penalty():
    """DAPO's ramp: 0 up to longest - buffer, and down to -1 at longest."""
    got = kit.overlong_penalty([10, 384, 385, 448, 512, 600], 512, 128)
    assert got == [0, 0, -1 / 128, -0.5, -1, -1]


def test_rewards_of_texts():
    prompts, texts = ["p"] * 5, [" 42\n", "it is 1,042.50", "= 4.2e1 .", "no", "-42"]
    assert kit.exact(prompts, texts, answer=["42", None, "42", "no", "42"], other=[1] * 5) == [
        1,
        None,
        0,
        1,
        0,
    ]
    assert [kit.last_number(x) for x in texts] == [42, 1042.5, 42, None, -42]
    assert [
        kit.equal_numbers(a, b)
        for a, b in (
            ("42", " so 42."),
            ("1042.5", texts[1]),
            ("0.1", "0.10"),
            ("42", "43 "),
            ("42", "no"),
            ("no", "no"),
        )
    ] == [1, 1, 1, 0, 0, 0]
    fits = kit.has_format(r"<think>.+</think> ?\d+")
    assert fits(
        prompts,
        [
            "<think>a\nb</think> 4",
            "<think></think>4",
            "4",
            "x <think>a</think>4",
            "\n<think>a</think>4\n",
        ],
    ) == [1, 0, 0, 0, 1]


def test_numeric_in_a_process_that_is_stopped(tmp_path, monkeypatch):
    assert kit.numeric(
        ["p"] * 4, ["= 42", "41", "x", "1,000"], answer=["42", 42, None, 1000.0]
    ) == [1, 0, None, 1]
    (tmp_path / "math_verify.py").write_text(
        "def parse(text):\n    return text.strip('$ ')\n\n"
        "def verify(a, b):\n    return a == 'x' and b == 'y'\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))  # if it is installed, it decides
    assert kit.numeric(["p"] * 3, ["$y$", "x", "42"], answer=["x", "x", "42"]) == [1, 0, 0]
    (tmp_path / "slow.py").write_text(
        "import time\nprint('1.0', flush=True)\nprint('0.0', flush=True)\ntime.sleep(60)\n"
    )
    pairs, slow = [("1", "1")] * 4, (sys.executable, str(tmp_path / "slow.py"))
    assert kit.verified(pairs, slow, seconds=2) == [1, 0, None, None]
    (tmp_path / "broken.py").write_text("raise ValueError('of the checker')\n")
    with pytest.raises(RuntimeError, match="of the checker"):
        kit.verified(pairs, (sys.executable, str(tmp_path / "broken.py")))


def test_a_config_imports_them(tmp_path):
    (tmp_path / "c.py").write_text(
        "from config.rewards import exact, has_format, numeric, overlong_penalty\n"
        "max_completion_length = 20\n"
        "def overlong(prompts, completions, completion_ids, **columns):\n"
        "    return overlong_penalty(map(len, completion_ids), max_completion_length, 10)\n"
        "reward = [exact, numeric, has_format('a+'), overlong]\n"
    )
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys; sys.path[0] = '.'; import train_grpo; "
            "from gosling import config, rewards; "
            f"cfg = config.load_config(train_grpo.Config, [{str(tmp_path / 'c.py')!r}]); "
            "print(list(rewards.reward_functions(cfg)))",
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines()[-1:] == ["['exact', 'numeric', 'has_format', 'overlong']"], (
        done.stderr
    )


# ----------------------------------------------------------------------------------------------
# models


def gspo(model, forks, chunk_len):
    """A sequence-level loss with a KL term, and its gradient, far enough off-policy to be
    clipped."""
    model.zero_grad()
    logps = forks.by_row(score_forks(model, forks, chunk_len, 0.7).logps)
    n, T = logps.shape
    mask = torch.arange(T)[None] < forks.cu_seqlens.diff()[:, None]
    away = 0.3 * torch.sin(torch.arange(n * T, dtype=torch.float64)).view(n, T)
    loss, metrics = policy_loss(
        logps,
        logps.detach() + away,
        torch.linspace(-1, 1.5, n, dtype=torch.float64),
        mask,
        loss_type="grpo",
        epsilon=0.02,
        importance_sampling_level="sequence",
        ref_logps=logps.detach() - 0.2,
        beta=0.1,
    )
    loss.backward()
    return loss.item(), trained_gradient(model), metrics["clip_ratio/region_mean"]


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize("mode", ["full", "state"])
def test_gspo_in_chunks_equals_the_whole(version, mode):
    """The gradient of a sequence-level loss through chunks of time, prompts included."""
    model = random_model(version).double()
    if mode == "state":
        tune(model, shift=True)
    forks = fork(GROUPS)
    loss, gradient, clipped = gspo(model, forks, 0)
    chunked_loss, chunked_gradient, _ = gspo(model, forks, 8)
    assert chunked_loss == pytest.approx(loss, rel=1e-9)
    assert (chunked_gradient - gradient).norm() < 1e-9 * gradient.norm()
    assert gradient.norm() > 1e-3 and 0 < clipped < 1


# ----------------------------------------------------------------------------------------------
# runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    for version in ("x070", "x060"):
        torch.manual_seed(0)
        model = RWKV(RWKVConfig(version, 2, 64, 257))
        with torch.no_grad():
            for p in model.parameters():
                p += 0.05 * torch.randn_like(p)
        model.save_pretrained(folder / f"{version}.pth")
    write(
        folder / "prompts.jsonl",
        *({"prompt": "abcdefghijkl"[i] * (1 + 5 * i), "n": i} for i in range(12)),
    )
    return folder


def spread(prompts, completions, **columns):
    """Numbers that depend on the text, seldom equal."""
    return [sum(map(ord, text)) % 97 / 97 for text in completions]


def tiny(base, out, **over):
    return Config(
        **{
            **dict(
                data=str(base / "prompts.jsonl"),
                init_from=str(base / "x070.pth"),
                tokenizer="bytes",
                out_dir=str(out),
                reward=spread,
                num_generations=4,
                max_completion_length=6,
                stop=(),
                micro_bsz=4,
                global_bsz=4,
                lr=1e-3,
                lr_final=1e-3,
                warmup_steps=0,
                max_steps=2,
                eval_every=0,
                save_every=0,
                rollouts_every=0,
                log_every=1,
                device="cpu",
                lora_r=4,
            ),
            **over,
        }
    )


def kept_groups(out):
    """The rollouts in last.pt: those of a run that stopped in the middle of them."""
    return torch.load(out / "last.pt", weights_only=True)["groups"]


def letters(prompts, completions, **columns):
    """Share of one letter."""
    return [text.count("e") / max(len(text), 1) for text in completions]


@pytest.fixture(scope="module")
def letters_base(tmp_path_factory):
    """A model of texts of a few letters, each text with a favourite of its own."""
    folder = tmp_path_factory.mktemp("letters")
    torch.manual_seed(0)
    model = RWKV(RWKVConfig("x070", 2, 64, 257))
    opt = torch.optim.AdamW(model.parameters(), 3e-3)
    for _ in range(80):
        texts = torch.where(
            torch.rand(32, 24) < torch.rand(32, 1) ** 0.3,
            *(torch.randint(97, 105, (32, n)) for n in (1, 24)),
        )
        (-model.token_logprobs(texts[:, :-1], texts[:, 1:]).mean()).backward()
        opt.step()
        opt.zero_grad()
    model.save_pretrained(folder / "x070.pth")
    write(folder / "prompts.jsonl", *({"prompt": text} for text in ("ah", "eb", "gc", "df")))
    return folder


@pytest.mark.parametrize("mode, lr", [("full", 2e-3), ("lora", 1e-2), ("state", 0.3)])
def test_learns_a_letter(mode, lr, letters_base, tmp_path):
    """In a few steps, from a reward that is the share of one letter."""
    train_grpo.main(
        tiny(
            letters_base,
            tmp_path / "run",
            tune=mode,
            reward=letters,
            lr=lr,
            lr_final=lr / 10,
            num_generations=16,
            max_steps=25,
            max_completion_length=8,
        )
    )
    log = [row["reward"] for row in rows(tmp_path / "run")]
    assert log[0] < 0.25 and sum(log[-3:]) / 3 > 0.9, log


@pytest.mark.parametrize("mode", ["full", "lora", "state"])
def test_equal_rewards_move_nothing(mode, base, tmp_path):
    def same(prompts, completions, **columns):
        return [0.1] * len(completions)  # the mean of three 0.1 is not 0.1

    train_grpo.main(tiny(base, tmp_path / "run", tune=mode, reward=same, num_generations=3))
    model, _ = load_model(base / "x070.pth")
    after, _ = load_model(
        tmp_path
        / "run"
        / {"full": "rwkv-final.pth", "lora": "lora-final.safetensors", "state": "state-final.pth"}[
            mode
        ]
    )
    idx = torch.arange(20)[None]
    assert torch.equal(model(idx)[0], after(idx)[0])
    for row in rows(tmp_path / "run"):
        assert (
            row["grad_norm"] == row["loss"] == row["reward_std"] == 0
            and row["frac_reward_zero_std"] == 1
        )
        assert row["reward"] == pytest.approx(0.1)


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize("mode", ["full", "lora", "state"])
def test_the_first_steps_by_hand(version, mode, base, tmp_path):
    """Two steps share one batch of rollouts: loss, ratio, KL and gap of both from the files, each
    sequence run whole; at step 1 the reference is the policy exactly, at step 2 it still gives the
    old numbers."""
    over = dict(
        tune=mode,
        init_from=str(base / f"{version}.pth"),
        beta=0.3,
        num_iterations=2,
        epsilon=0.01,
        temperature=0.7,
        lr=3e-3,
        lr_final=3e-3,
        loss_type="dapo",
    )
    train_grpo.main(tiny(base, tmp_path / "one", max_steps=1, **over))
    train_grpo.main(tiny(base, tmp_path / "two", max_steps=2, **over))
    groups, log = kept_groups(tmp_path / "one"), rows(tmp_path / "two")
    assert (log[0]["loss"], log[0]["ratio"]) == (rows(tmp_path / "one")[0]["loss"], 1.0)
    assert log[0]["kl"] == 0 and log[0]["clip_ratio/region_mean"] == 0 and log[1]["kl"] > 1e-6
    file = {"full": "rwkv-final.pth", "lora": "lora-final.safetensors", "state": "state-final.pth"}[
        mode
    ]
    before, after = load_model(base / f"{version}.pth")[0], load_model(tmp_path / "one" / file)[0]
    a, lp, old, gaps = [], [], [], []
    for group in groups:
        a += advantages_by_hand(group["reward"], 4, "group")
        assert group["advantages"] == pytest.approx(a[-4:], abs=1e-6)
        assert group["reward"] == spread(None, [c["text"] for c in group["completions"]]) and group[
            "row"
        ]["prompt"] == BYTES.decode(group["ids"])
        for c in group["completions"]:
            ids = torch.tensor([group["ids"] + c["tokens"]])
            for net, out in ((before, old), (after, lp)):
                with torch.no_grad():
                    out.append(
                        net.token_logprobs(ids[:, :-1], ids[:, 1:], temperature=0.7)[
                            0, len(group["ids"]) - 1 :
                        ].tolist()
                    )
            gaps += [abs(x - y) for x, y in zip(old[-1], c["logprobs"], strict=True)]
            assert c["old"] == pytest.approx(old[-1], abs=1e-5)
    assert sum(gaps) / len(gaps) < 1e-5 and max(gaps) < 1e-4
    longest = max(map(len, lp))
    mask = [[int(j < len(x)) for j in range(longest)] for x in lp]
    lp, old = ([x + [0.0] * (longest - len(x)) for x in many] for many in (lp, old))
    assert log[0]["loss"] == pytest.approx(by_hand(old, a, mask, old, loss_type="dapo"), abs=1e-6)
    want = by_hand(lp, a, mask, old, loss_type="dapo", epsilon=0.01, beta=0.3, ref=old)
    assert (
        log[1]["loss"] == pytest.approx(want, rel=1e-3, abs=1e-5)
        and abs(want - log[0]["loss"]) > 1e-4
    )
    kl = by_hand(lp, [0.0] * len(a), mask, old, loss_type="dapo", beta=1.0, ref=old)
    assert (
        log[1]["kl"] == pytest.approx(kl, rel=1e-2)
        and log[1]["ratio"] != 1
        and log[1]["clip_ratio/region_mean"] > 0
    )
    for row in log:
        assert (
            row["sampling/sampling_logp_difference/mean"] < 1e-5
            and row["sampling/sampling_logp_difference/max"] < 1e-4
        )


@pytest.mark.parametrize(
    "mode, file", [("lora", "lora-final.safetensors"), ("state", "state-final.pth")]
)
def test_the_reference_is_what_training_starts_from(mode, file, base, tmp_path):
    """Going on from an adapter or a state, the KL term is 0 at first; "off" names the other
    choice."""
    train_grpo.main(tiny(base, tmp_path / "a", tune=mode, lr=3e-2, lr_final=3e-2))
    over = dict(tune=mode, adapter=str(tmp_path / "a" / file), beta=0.1, max_steps=1)
    train_grpo.main(tiny(base, tmp_path / "start", **over))
    train_grpo.main(tiny(base, tmp_path / "off", **over, reference="off"))
    assert rows(tmp_path / "start")[0]["kl"] == pytest.approx(0, abs=1e-9)
    assert rows(tmp_path / "off")[0]["kl"] > 1e-5


@pytest.mark.parametrize("mode", ["full", "lora", "state"])
def test_on_policy_the_ratio_is_one_whatever_the_prompts(mode, base, tmp_path):
    write(
        tmp_path / "p.jsonl",
        {"prompt": "x"},
        {"prompt": "yz"},
        {"prompt": "long " * 60},
        {"prompt": [{"role": "user", "content": "hi"}]},
    )
    for name, more in {
        "a": {},
        "b": dict(micro_bsz=1, steps_per_generation=2, num_iterations=2),
        "c": dict(chunk_len=5),
    }.items():
        train_grpo.main(
            tiny(
                base,
                tmp_path / name,
                data=str(tmp_path / "p.jsonl"),
                tune=mode,
                max_completion_length=12,
                **more,
            )
        )
        row = rows(tmp_path / name)[0]
        assert (
            row["ratio"] == pytest.approx(1, abs=0 if name != "b" else 1e-6)
            and row["clip_ratio/region_mean"] == 0
        )
        assert (
            row["sampling/sampling_logp_difference/mean"] < 1e-5
            and row["sampling/sampling_logp_difference/max"] < 1e-4
        )
        assert 4 < row["entropy"] < math.log(257)


CONFIG = '''
def reward(prompts, completions, n, **columns):
    """1 if there is a vowel among a few random bytes; the prompt decides how many count."""
    letters = "aeiouAEIOU0123456789!?., "
    rows = zip(completions, n)
    return [float(any(c in letters[:5 + k] for c in text)) for text, k in rows]
'''


def test_loss_does_not_depend_on_micro_batch_or_processes(base, tmp_path):
    (tmp_path / "c.py").write_text(CONFIG)
    reward = config.read_config_file(tmp_path / "c.py", Config)["reward"]
    over = dict(
        dynamic_sampling=3,
        adam_eps=1e-3,
        max_steps=4,
        beta=0.1,
        steps_per_generation=2,
        max_completion_length=4,
        val_data=str(base / "prompts.jsonl"),
        eval_every=2,
    )
    layouts = {
        "1x4": {},
        "1x1": dict(micro_bsz=1),
        "1x2": dict(micro_bsz=2),
        "chunks": dict(chunk_len=20),
    }
    for name, more in layouts.items():
        train_grpo.main(tiny(base, tmp_path / name, **over, **more, reward=reward))
    cfg = tiny(base, tmp_path / "2x1", micro_bsz=1, **over, reward=None)
    file = str(tmp_path / "c.py")
    done = torchrun("train_grpo.py", cfg, nproc=2, config_file=file)
    assert done.returncode == 0, done.stderr
    want = rows(tmp_path / "1x4")
    cursors = [
        torch.load(tmp_path / name / "last.pt", weights_only=True)["cursor"]
        for name in (*layouts, "2x1")
    ]
    assert (
        len({*cursors}) == 1 and cursors[0] > 16 and want[-1]["loss"] != 0
    )  # groups were replaced, the same ones
    for name in (*layouts, "2x1"):
        for a, b in zip(rows(tmp_path / name), want, strict=True):
            assert a.keys() == b.keys()
            for key in b.keys() - {"time", "tokens_per_s", "seconds/rollout", "seconds/train"}:
                tight = a["step"] <= 2 or key in ("reward", "step")
                gap = key.startswith("sampling/")
                assert a[key] == pytest.approx(
                    b[key], rel=1e-5 if tight and not gap else 1e-3, abs=1e-5 if gap else 1e-6
                ), (name, a["step"], key)


@pytest.mark.parametrize("mode", ["full", "lora", "state"])
def test_resume_is_bit_for_bit(mode, base, tmp_path):
    """Stopped in the middle of a batch of rollouts, whose old log-probabilities, advantages and
    place it needs."""
    over = dict(
        tune=mode,
        steps_per_generation=2,
        num_iterations=2,
        max_steps=9,
        global_bsz=2,
        micro_bsz=1,
        beta=0.1,
        dynamic_sampling=1,
        val_data=str(base / "prompts.jsonl"),
        eval_every=4,
    )
    train_grpo.main(tiny(base, tmp_path / "whole", **over))
    kill_after(tiny(base, tmp_path / "parts", **over), 5 if mode == "full" else 7, train_grpo.main)
    train_grpo.main(tiny(base, tmp_path / "parts", **over, resume=True))
    a, b = (
        torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts")
    )
    assert (a["best_loss"], a["cursor"], a["groups"]) == (b["best_loss"], b["cursor"], b["groups"])
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    for x, y in zip(rows(tmp_path / "whole"), rows(tmp_path / "parts"), strict=True):
        assert {
            k: v for k, v in x.items() if k not in ("time", "tokens_per_s") and "seconds" not in k
        } == {
            k: v for k, v in y.items() if k not in ("time", "tokens_per_s") and "seconds" not in k
        }
    assert [row["ratio"] == 1 for row in rows(tmp_path / "whole") if "ratio" in row][:2] == [
        True,
        False,
    ]


def test_missing_rewards_are_left_out(base, tmp_path):
    def first(prompts, completions, **columns):
        missing = {1: None, 2: math.nan}
        return [missing.get(i % 4, float(i)) for i in range(len(completions))]

    def second(prompts, completions, n, completion_ids, **columns):
        assert all(
            len(ids) <= 6 and BYTES.decode([k for k in ids if k]) == text
            for ids, text in zip(completion_ids, completions, strict=False)
        )
        return [None if i % 4 == 1 else k for i, k in enumerate(n)]

    train_grpo.main(
        tiny(
            base,
            tmp_path / "run",
            reward=[first, second],
            reward_weights=(2.0, 0.5),
            max_steps=1,
            steps_per_generation=2,
        )
    )
    groups = kept_groups(tmp_path / "run")
    for at, group in enumerate(groups):
        k = group["row"]["n"]
        want = [2 * 4 * at + k / 2, math.nan, k / 2, 2 * (4 * at + 3) + k / 2]
        assert group["reward"] == pytest.approx(want, nan_ok=True) and group[
            "advantages"
        ] == pytest.approx(advantages_by_hand(want, 4, "group"), abs=1e-6)
        assert group["rewards"] == {
            "first": [4 * at, None, None, 4 * at + 3],
            "second": [k, None, k, k],
        }
    row, mine = rows(tmp_path / "run")[0], groups[:4]
    there = [r for group in mine for r in group["reward"] if not math.isnan(r)]
    assert row["reward"] == pytest.approx(sum(there) / len(there)) and row[
        "rewards/first/mean"
    ] == pytest.approx((0 + 3 + 4 + 7 + 8 + 11 + 12 + 15) / 8)
    assert row["rewards/second/mean"] == pytest.approx(sum(group["row"]["n"] for group in mine) / 4)


def test_dynamic_sampling_replaces_groups_without_spread(base, tmp_path):
    def odd(prompts, completions, n, **columns):  # prompts of odd numbers have spread
        return [float(k % 2 and i % 4 == 0) for i, k in enumerate(n)]

    for rounds in (0, 9, 1):
        train_grpo.main(
            tiny(
                base,
                tmp_path / str(rounds),
                reward=odd,
                dynamic_sampling=rounds,
                max_steps=1,
                num_iterations=2,
            )
        )
        groups, cursor = (
            kept_groups(tmp_path / str(rounds)),
            torch.load(tmp_path / str(rounds) / "last.pt", weights_only=True)["cursor"],
        )
        order = shuffled(range(cursor), 12, 42)
        assert len(groups) == 4 and [group["row"]["n"] for group in groups] == [
            order[group["number"]] for group in groups
        ]
        if rounds == 0:
            assert [group["number"] for group in groups] == [0, 1, 2, 3] and any(
                group["row"]["n"] % 2 == 0 for group in groups
            )
        if rounds == 9:  # the first four with spread, in their order
            assert [group["number"] for group in groups] == [
                i for i in range(cursor) if order[i] % 2
            ][:4]
        if rounds == 1:  # what the last round gives stays
            want = [i for i in range(4) if order[i] % 2]
            assert [group["number"] for group in groups] == want + list(
                range(4, cursor)
            ) and cursor == 8 - len(want)
        assert (
            rows(tmp_path / str(rounds))[0]["frac_reward_zero_std"]
            == sum(group["row"]["n"] % 2 == 0 for group in groups) / 4
        )


def test_truncated_completions_masked(base, tmp_path):
    over = dict(
        stop=tuple(" abcdefghijklmnopqrstuvwxyz"),
        max_completion_length=8,
        num_iterations=2,
        max_steps=1,
    )
    train_grpo.main(tiny(base, tmp_path / "run", mask_truncated_completions=True, **over))
    groups = kept_groups(tmp_path / "run")
    completions = [c for group in groups for c in group["completions"]]
    cut = [c["finish_reason"] == "length" for c in completions]
    assert 0 < sum(cut) < len(cut)
    assert [c["mask"] for c in completions] == [
        [0 if x else 1] * len(c["tokens"]) for c, x in zip(completions, cut, strict=False)
    ]
    a = advantages_by_hand(
        [r for group in groups for r in group["reward"]], 4, "group"
    )  # truncated rows keep their place there
    n = sum(len(c["tokens"]) for c, x in zip(completions, cut, strict=False) if not x)
    row = rows(tmp_path / "run")[0]
    assert row["loss"] == pytest.approx(
        -sum(x * len(c["tokens"]) for x, c, no in zip(a, completions, cut, strict=False) if not no)
        / n,
        abs=1e-6,
    )
    assert row["completions/clipped_ratio"] == sum(cut) / 16 and row["completions/max_length"] == 8
    train_grpo.main(
        tiny(base, tmp_path / "all", mask_truncated_completions=True, max_steps=1, stop=())
    )
    row = rows(tmp_path / "all")[0]
    if row["completions/clipped_ratio"] == 1:
        assert row["loss"] == row["grad_norm"] == 0


def test_process_changes_tokens_and_masks(base, tmp_path):
    def tool(every, completions):
        for row, c in zip(every, completions, strict=True):
            assert row["prompt"]
            c.tokens += BYTES.encode("=7")
            c.text += "=7"
        return [[1] * (len(c.tokens) - 2) + [0, 0] for c in completions]

    def ends(prompts, completions, **columns):
        assert all(text.endswith("=7") for text in completions)
        return spread(prompts, completions)

    train_grpo.main(
        tiny(base, tmp_path / "run", process=tool, reward=ends, num_iterations=2, max_steps=1)
    )
    groups = kept_groups(tmp_path / "run")
    completions = [c for group in groups for c in group["completions"]]
    assert all(
        c["mask"] == [1] * (len(c["tokens"]) - 2) + [0, 0]
        and c["logprobs"] is None
        and c["tokens"][-2:] == BYTES.encode("=7")
        for c in completions
    )
    a = advantages_by_hand([r for group in groups for r in group["reward"]], 4, "group")
    n = [sum(c["mask"]) for c in completions]
    assert rows(tmp_path / "run")[0]["loss"] == pytest.approx(
        -sum(x * k for x, k in zip(a, n, strict=False)) / sum(n), abs=1e-6
    )
    with pytest.raises(UserError, match="expected a mask for each completion"):
        train_grpo.main(
            tiny(base, tmp_path / "bad", process=lambda rows, completions: [[1]] * len(completions))
        )


def test_a_reward_model_by_path(base, tmp_path):
    write(
        tmp_path / "pairs.jsonl",
        *({"prompt": x, "chosen": "aa", "rejected": "b"} for x in "abcdefgh"),
    )
    train_reward.main(
        train_reward.Config(
            data=str(tmp_path / "pairs.jsonl"),
            init_from=str(base / "x070.pth"),
            tokenizer="bytes",
            device="cpu",
            lr=1e-3,
            out_dir=str(tmp_path / "reward"),
            micro_bsz=8,
            global_bsz=8,
            max_steps=3,
            eval_every=0,
            warmup_steps=0,
        )
    )
    path = tmp_path / "reward/rwkv-final.pth"
    train_grpo.main(
        tiny(
            base,
            tmp_path / "run",
            reward_model=str(path),
            reward_weights=(1.0, 3.0),
            max_steps=1,
            num_iterations=2,
            micro_bsz=2,
        )
    )
    judge, _ = load_model(path)
    for group in kept_groups(tmp_path / "run"):
        with torch.no_grad():
            want = [
                float(judge(torch.tensor([group["ids"] + c["tokens"]]), score=True)[0])
                for c in group["completions"]
            ]
        assert (
            group["rewards"]["reward_model"] == pytest.approx(want, abs=1e-5) and len(set(want)) > 1
        )
        assert group["reward"] == pytest.approx(
            [x + 3 * y for x, y in zip(group["rewards"]["spread"], want, strict=False)], abs=1e-4
        )
    train_grpo.main(
        tiny(base, tmp_path / "alone", reward=None, reward_model=str(path), max_steps=1)
    )
    row = rows(tmp_path / "alone")[0]
    assert row["reward"] == pytest.approx(row["rewards/reward_model/mean"], abs=1e-6) != 0
    with pytest.raises(UserError, match="has no score.weight"):
        train_grpo.main(tiny(base, tmp_path / "bad", reward_model=str(base / "x070.pth")))


def test_pass_at_k_and_rollouts_and_best(base, tmp_path):
    seen = []

    def some(prompts, completions, n, **columns):
        seen.append(list(zip(n, completions, strict=False)))
        return [1.0 if k == 0 or k == 1 and i % 3 == 2 else 0.25 for i, k in enumerate(n)]

    write(tmp_path / "val.jsonl", *({"prompt": f"held out {i}", "n": i} for i in range(4)))
    train_grpo.main(
        tiny(
            base,
            tmp_path / "run",
            reward=some,
            val_data=str(tmp_path / "val.jsonl"),
            eval_generations=3,
            eval_every=2,
            max_steps=4,
            num_iterations=2,
            rollouts_every=1,
            save_every=1,
            keep_last=2,
            eval_fn=lambda model, tokenizer: {"mine": 5.0},
        )
    )
    log = rows(tmp_path / "run")
    for row in (log[0], log[2], log[4]):
        assert row["val_pass@1"] == pytest.approx((3 + 1) / 12) and row[
            "val_pass@3"
        ] == pytest.approx(2 / 4)
        assert row["val_reward"] == pytest.approx((4 * 1.0 + 8 * 0.25) / 12) and row["mine"] == 5.0
    assert len({text for _, text in seen[0]}) == 12  # other random streams for each
    assert (tmp_path / "run/best.pth").exists() and sorted(
        p.name for p in (tmp_path / "run").glob("rwkv-*")
    ) == ["rwkv-2.pth", "rwkv-3.pth", "rwkv-final.pth"]
    assert sorted(p.name for p in (tmp_path / "run/rollouts").iterdir()) == ["0.jsonl", "2.jsonl"]
    lines = [
        json.loads(line) for line in (tmp_path / "run/rollouts/2.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 4 and lines[0].keys() == {
        "prompt",
        "completions",
        "rewards",
        "finish_reasons",
    }
    assert [text for line in lines for text in line["completions"]] == [
        text for _, text in seen[3]
    ] and len(lines[0]["rewards"]["some"]) == 4
    assert {r for line in lines for r in line["finish_reasons"]} <= {"stop", "length"}


def test_held_out_samples_have_random_streams_of_their_own(base, tmp_path):
    seen = []
    write(tmp_path / "p.jsonl", {"prompt": "x"})
    train_grpo.main(
        tiny(
            base,
            tmp_path / "run",
            data=str(tmp_path / "p.jsonl"),
            val_data=str(tmp_path / "p.jsonl"),
            global_bsz=1,
            micro_bsz=1,
            max_steps=1,
            reward=lambda prompts, completions, **columns: seen.append(completions) or [0.0] * 4,
        )
    )
    assert len({text for texts in seen[:2] for text in texts}) == 8


def test_epochs_are_passes_over_the_prompts(base, tmp_path):
    train_grpo.main(
        tiny(
            base,
            tmp_path / "run",
            max_steps=None,
            epochs=1,
            num_iterations=2,
            global_bsz=6,
            micro_bsz=6,
        )
    )
    assert len(rows(tmp_path / "run")) == 4
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["cursor"] == 12


def test_importance_weights_and_gspo_and_cispo_in_a_run(base, tmp_path):
    """Sampler and trainer agree, so importance weights change nothing; the variants run, and GSPO
    on-policy is GRPO."""
    losses = {}
    for name, more in {
        "grpo": dict(loss_type="grpo"),
        "tis": dict(loss_type="grpo", importance_cap=2.0),
        "gspo": dict(loss_type="grpo", importance_sampling_level="sequence", epsilon=3e-4),
        "dr": dict(loss_type="dr_grpo", scale_rewards="none"),
        "cispo": dict(loss_type="cispo", epsilon_high=5.0),
    }.items():
        train_grpo.main(tiny(base, tmp_path / name, max_steps=1, **more))
        losses[name] = rows(tmp_path / name)[0]
    assert losses["tis"]["loss"] == pytest.approx(losses["grpo"]["loss"], abs=1e-5)
    assert losses["gspo"]["grad_norm"] == pytest.approx(losses["grpo"]["grad_norm"], rel=1e-4)
    assert (
        "cispo_clip_ratio" in losses["cispo"]
        and losses["dr"]["grad_norm"] < losses["grpo"]["grad_norm"]
    )


def raises_on(prompts, completions, n, **columns):
    if 7 in n:
        raise KeyError("seven")
    return [0.5 + i for i in range(len(n))]


later = itertools.count()


@pytest.mark.parametrize(
    "reward, words",
    [
        (
            lambda prompts, completions, **columns: [1.0],
            "returned list of 1; expected a list of 16",
        ),
        (lambda prompts, completions, **columns: 1.0, "returned float"),
        (lambda prompts, completions, **columns: ["1"] * 16, "gave '1' for completion"),
        (lambda prompts, completions, **columns: [math.inf] * 16, "gave inf for"),
        (raises_on, "reward raises_on failed: KeyError: 'seven'"),
        (lambda prompts, completions, **columns: [None] * 16, "every reward of this batch is None"),
        (
            lambda prompts, completions, **columns: 1 / (len(prompts) == 1),
            "failed: ZeroDivisionError",
        ),
    ],
)
def test_bad_rewards(reward, words, base, tmp_path):
    """The rollouts are kept, and what was saved before stays."""
    calls = []

    def breaks(prompts, completions, **columns):  # in the second batch of rollouts
        calls.append(len(prompts))
        return (
            [float(i) for i in range(16)]
            if len(calls) == 1
            else reward(prompts, completions, **columns)
        )

    breaks.__name__ = reward.__name__
    write(tmp_path / "p.jsonl", *({"prompt": "h" * 36, "n": 7} for _ in range(4)))
    with pytest.raises(UserError, match=words) as e:
        train_grpo.main(
            tiny(
                base, tmp_path / "run", data=str(tmp_path / "p.jsonl"), reward=breaks, save_every=1
            )
        )
    assert (
        "rollouts/failed.jsonl" in str(e.value)
        and reward.__name__ in str(e.value)
        or "every reward" in words
    )
    assert len((tmp_path / "run/rollouts/failed.jsonl").read_text().splitlines()) == 4
    assert (
        torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 1
        and (tmp_path / "run/rwkv-1.pth").exists()
    )


@pytest.mark.parametrize(
    "over, words",
    [
        (dict(init_from=""), "which model"),
        (dict(data="no.jsonl"), "no.jsonl does not exist"),
        (dict(data="EMPTY"), 'EMPTY:2: "prompt" is missing or empty.*bad rows: 1 '),
        (dict(data="NOTHING"), "holds nothing|holds no prompts|is empty"),
        (dict(val_data="EMPTY"), "EMPTY:2: "),
        (
            dict(num_generations=1),
            "num_generations=1: expected a number greater than or equal to 2",
        ),
        (dict(reward=None), "no reward: define"),
        (dict(reward_weights=(1.0, 2.0)), "reward_weights has 2 numbers for 1 rewards: spread"),
        (dict(loss_type="cispo"), "give it, about 5"),
        (dict(reward=[5, spread]), "reward=.5, spread.: expected callable"),
        (dict(max_completion_length=99, ctx_len=64), "leaves no prompt any room in ctx_len=64"),
        (dict(reward=[spread, spread]), "2 rewards, but only 1 names: spread"),
        (dict(temperature=0.0), "temperature=0.0: expected a number greater than 0"),
        (dict(steps_per_generation=0), "steps_per_generation=0"),
        (dict(beta=0.1, reference="OTHER"), "vocabulary of 300.*one of 257"),
        (dict(beta=0.1, reference="off"), "tune=full has neither"),
        (dict(micro_bsz=3), "not a multiple of micro_bsz"),
    ],
)
def test_bad_input(over, words, base, tmp_path):
    RWKV(RWKVConfig("x070", 1, 64, 300)).save_pretrained(tmp_path / "OTHER")
    write(tmp_path / "EMPTY", {"prompt": "x"}, {"prompt": ""})
    write(tmp_path / "NOTHING")
    over = {
        k: str(tmp_path / v) if v in ("OTHER", "EMPTY", "NOTHING") else v for k, v in over.items()
    }
    with pytest.raises(UserError, match=words):
        train_grpo.main(tiny(base, tmp_path / "run", **over))


@pytest.mark.parametrize("how", ["limit", "signal"])
def test_a_reward_that_hangs_is_ended_and_the_run_goes_on(how, base, tmp_path):
    """At its time limit with an error, at the first signal with exit status 130; saved before."""
    calls = []

    def reward(prompts, completions, **columns):
        calls.append(len(prompts))
        if len(calls) == 3:
            if how == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        return spread(prompts, completions)

    limit = 0.5 if how == "limit" else None
    cfg = tiny(base, tmp_path / "run", reward=reward, max_steps=4, reward_seconds=limit)
    expected = pytest.raises(UserError, match="took longer than 0.5 s.*last.pt is saved at step 2")
    with expected if how == "limit" else pytest.raises(SystemExit, match="130"):
        train_grpo.main(cfg)
    assert torch.load(tmp_path / "run/last.pt", weights_only=True)["step"] == 2
    train_grpo.main(dataclasses.replace(cfg, resume=True))
    train_grpo.main(tiny(base, tmp_path / "whole", reward=reward, max_steps=4))
    ended, whole = (
        torch.load(tmp_path / name / "rwkv-final.pth", weights_only=True)
        for name in ("run", "whole")
    )
    assert all(torch.equal(ended[name], whole[name]) for name in whole)


def test_groups_in_last_pt_that_no_run_sampled_are_refused(base, tmp_path):
    cfg = tiny(base, tmp_path / "run", steps_per_generation=2, max_steps=1)
    train_grpo.main(cfg)
    path, cfg = tmp_path / "run/last.pt", dataclasses.replace(cfg, resume=True, max_steps=2)
    whole = torch.load(path, weights_only=True)
    for change, words in (
        (lambda groups: groups.pop(), "groups are not 8 of 4 completions each"),
        (lambda groups: groups[0]["completions"].pop(), "as many numbers as completions"),
        (lambda groups: groups[0].update(ids=[999]), "of the model's ids"),
        (lambda groups: groups[0].update(ids="x"), "groups.0.ids is 'x'; expected a valid list"),
        (lambda groups: groups[0]["completions"][0].pop("old"), "groups are not 8 of 4"),
        (lambda groups: groups[0]["completions"][0].update(mask=[1]), "as many numbers as tokens"),
        (lambda groups: groups[0].pop("advantages"), "groups.0.advantages is missing"),
    ):
        last = copy.deepcopy(whole)
        change(last["groups"])
        torch.save(last, path)
        with pytest.raises(UserError, match=f"last.pt: .*{words}"):
            train_grpo.main(cfg)
