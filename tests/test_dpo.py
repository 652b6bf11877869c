"""train_dpo.py, shared prompts: losses by hand, gradients, the same however it is run."""

import json
import math

import train_dpo
from gosling.batch import fork, score_forks
from gosling.config import UserError
from gosling.data import read_preferences
from gosling.tokenizer import load_tokenizer
from gosling.tune import load_model
from model import RWKV, RWKVConfig
from train_dpo import Config, dpo_loss

import pytest
import torch
from helpers import GROUPS, kill_after, random_model, rows, torchrun, trained_gradient, tune, write

BYTES = load_tokenizer("bytes")


def sigma(x):
    return 1 / (1 + math.exp(-x))


# chosen, rejected, reference's chosen and rejected, tokens of both: three pairs
C, R, RC, RR = [-10.0, -4.0, -7.5], [-12.0, -3.0, -7.0], [-11.0, -4.5, -7.0], [-11.5, -2.0, -8.0]
NC, NR = [5, 2, 4], [6, 1, 4]


def by_hand(c, q, rc, rq, nc, nq, loss_type, beta, e, gamma):
    """The formulas of the docstring in plain numbers."""
    h = beta * ((c - rc) - (q - rq))
    if loss_type == "sigmoid":
        return -(1 - e) * math.log(sigma(h)) - e * math.log(sigma(-h))
    if loss_type == "robust":
        return (-(1 - e) * math.log(sigma(h)) + e * math.log(sigma(-h))) / (1 - 2 * e)
    if loss_type == "hinge":
        return max(0.0, 1 - h)
    if loss_type == "ipo":
        return ((c - rc) / nc - (q - rq) / nq - 1 / (2 * beta)) ** 2
    return -math.log(sigma(beta * (c / nc - q / nq) - gamma))  # simpo


@pytest.mark.parametrize(
    "loss_type, beta, e",
    [
        ("sigmoid", 0.1, 0.0),
        ("sigmoid", 0.5, 0.2),
        ("robust", 0.3, 0.1),
        ("hinge", 0.7, 0.0),
        ("ipo", 0.1, 0.0),
        ("simpo", 2.0, 0.0),
    ],
)
def test_losses_and_gradients_by_hand(loss_type, beta, e):
    tensors = [
        torch.tensor(x, dtype=torch.float64, requires_grad=i < 2)
        for i, x in enumerate((C, R, RC, RR))
    ]
    options = dict(
        beta=beta,
        loss_type=loss_type,
        label_smoothing=e,
        chosen_len=torch.tensor(NC),
        rejected_len=torch.tensor(NR),
        gamma=0.6,
    )
    losses, chosen, rejected = dpo_loss(*tensors, **options)
    losses.sum().backward()
    for i in range(3):
        args = [x[i] for x in (C, R, RC, RR, NC, NR)]
        assert losses[i].item() == pytest.approx(by_hand(*args, loss_type, beta, e, 0.6), abs=1e-9)
        for which in (0, 1):
            moved = [[*args], [*args]]
            moved[0][which] += 1e-6
            moved[1][which] -= 1e-6
            slope = (
                by_hand(*moved[0], loss_type, beta, e, 0.6)
                - by_hand(*moved[1], loss_type, beta, e, 0.6)
            ) / 2e-6
            assert tensors[which].grad[i].item() == pytest.approx(slope, abs=1e-6)
        if loss_type == "simpo":
            assert chosen[i].item() == pytest.approx(beta * C[i] / NC[i])
        else:
            assert chosen[i].item() == pytest.approx(beta * (C[i] - RC[i])) and rejected[
                i
            ].item() == pytest.approx(beta * (R[i] - RR[i]))
    assert not chosen.requires_grad


def test_numbers_that_can_be_checked_on_paper():
    def t(*x):
        return torch.tensor(x, dtype=torch.float64)

    # h = 0.1 * ((-10 + 11) - (-12 + 11.5)) = 0.15; log(1 + exp(-0.15)) = 0.6209570
    assert dpo_loss(t(-10), t(-12), t(-11), t(-11.5))[0].item() == pytest.approx(
        0.6209570, abs=1e-6
    )
    assert dpo_loss(t(-10), t(-12), t(-11), t(-11.5), loss_type="hinge")[0].item() == pytest.approx(
        0.85
    )
    # ipo: (1 / 5 + 0.5 / 6 - 5)^2 with lengths, (1.5 - 5)^2 = 12.25 in sums
    assert dpo_loss(t(-10), t(-12), t(-11), t(-11.5), loss_type="ipo")[0].item() == pytest.approx(
        12.25
    )
    got = dpo_loss(
        t(-10), t(-12), t(-11), t(-11.5), loss_type="ipo", chosen_len=t(5), rejected_len=t(6)
    )[0].item()
    assert got == pytest.approx((0.2 + 1 / 12 - 5) ** 2)
    # simpo: 2 * (-10/5 + 12/6) - 0.5 = -0.5; log(1 + exp(0.5)) = 0.9740770
    assert dpo_loss(
        t(-10), t(-12), beta=2.0, loss_type="simpo", chosen_len=t(5), rejected_len=t(6)
    )[0].item() == pytest.approx(0.9740770, abs=1e-6)


def test_at_the_reference_ln2_and_the_gradient_of_each_token():
    """And cDPO with e = 0.5 is symmetric, smoothing changes the loss, robust with e = 0 is
    sigmoid."""
    tokens = torch.randn(4, 2, 7, dtype=torch.float64).requires_grad_()
    logps = tokens.sum(-1)
    losses, chosen, rejected = dpo_loss(*logps.T, *logps.detach().T, beta=0.3)
    losses.mean().backward()
    assert (
        losses.tolist() == [pytest.approx(math.log(2), abs=1e-12)] * 4
        and not chosen.any()
        and not (chosen > rejected).any()
    )
    assert torch.allclose(tokens.grad[:, 0], torch.tensor(-0.3 / 2 / 4, dtype=torch.float64))
    assert torch.allclose(tokens.grad[:, 1], torch.tensor(0.3 / 2 / 4, dtype=torch.float64))
    a = [torch.tensor(x) for x in (C, R, RC, RR)]
    swapped = [a[1], a[0], a[3], a[2]]
    assert torch.allclose(
        dpo_loss(*a, label_smoothing=0.5)[0], dpo_loss(*swapped, label_smoothing=0.5)[0]
    )
    assert not torch.allclose(
        dpo_loss(*a, label_smoothing=0.2)[0], dpo_loss(*swapped, label_smoothing=0.2)[0]
    )
    assert not torch.allclose(dpo_loss(*a, label_smoothing=0.2)[0], dpo_loss(*a)[0])
    assert torch.allclose(dpo_loss(*a, loss_type="robust")[0], dpo_loss(*a)[0])


def test_ipo_per_token_and_in_sums():
    """Twice the tokens, half the log-ratio of each: the sums stay, the means halve."""
    logps = [torch.tensor(x) for x in (C, R, RC, RR)]

    def mean_difference(factor):
        lengths = [factor * torch.tensor(n) for n in (NC, NR)]
        options = dict(chosen_len=lengths[0], rejected_len=lengths[1])
        losses = dpo_loss(*logps, loss_type="ipo", **options)[0]
        return 5 - losses.sqrt()  # 1 / (2 beta) = 5, and every difference here is below it

    once, twice = mean_difference(1), mean_difference(2)
    assert torch.allclose(twice, once / 2, atol=1e-5) and once.abs().min() > 0.1


def test_spins_loss_is_dpos():
    """SPIN: l(lambda (log-ratio of the human's answer - log-ratio of the model's own))."""
    losses = dpo_loss(*(torch.tensor(x) for x in (C, R, RC, RR)), beta=0.1)[0]
    for loss, c, r, rc, rr in zip(losses.tolist(), C, R, RC, RR, strict=True):
        want = -math.log(sigma(0.1 * ((c - rc) - (r - rr))))
        assert loss == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    "bad, words",
    [
        (dict(loss_type="hinge", label_smoothing=0.1), "it is for sigmoid"),
        (dict(loss_type="robust", label_smoothing=0.5), "below 0.5"),
        (dict(loss_type="simpo"), "needs chosen_len"),
        (dict(loss_type="dpo"), "expected sigmoid, hinge"),
    ],
)
def test_what_does_not_go_together(bad, words):
    with pytest.raises(ValueError, match=words):
        dpo_loss(*torch.zeros(4, 1), **bad)
    with pytest.raises(ValueError, match="needs the reference"):
        dpo_loss(*torch.zeros(2, 1))


# ----------------------------------------------------------------------------------------------
# shared prompts


def pair_loss(logps):
    """logps [2, 3] of GROUPS -> DPO's loss against a reference a little away from them."""
    away = torch.tensor([[0.3, -0.2, 0.1], [-0.1, 0.4, 0.2]], dtype=logps.dtype)
    return dpo_loss(*logps, *(logps.detach() + away), beta=0.5)[0].sum()


def shared_gradient(model, chunk_len=0):
    """Loss and gradient of pair_loss when a prompt runs once for both answers."""
    forks = fork(GROUPS)
    model.zero_grad()
    scores = score_forks(model, forks, chunk_len)
    loss = pair_loss(forks.per_answer(scores.logps).view(-1, 2).T)
    loss.backward()
    return loss.item(), trained_gradient(model)


@pytest.mark.parametrize("version", ["x060", "x070"])
@pytest.mark.parametrize("mode", ["full", "state"])
def test_shared_prompts_equal_the_two_full_sequences(version, mode):
    """Log-probabilities, gradient, gradient in chunks, also of the initial state."""
    model = random_model(version).double()
    if mode == "state":
        tune(model, shift=True)
    loss, got = shared_gradient(model)
    model.zero_grad()
    logps = []
    for prompt, answers in GROUPS:
        for answer in answers:
            ids = torch.tensor([prompt + answer])
            logps.append(model.token_logprobs(ids[:, :-1], ids[:, 1:])[0, len(prompt) - 1 :].sum())
    logps = torch.stack(logps).view(-1, 2).T
    forks = fork(GROUPS)
    with torch.no_grad():
        for chunk_len in (0, 7):
            scores = score_forks(model, forks, chunk_len)
            shared = forks.per_answer(scores.logps).view(-1, 2).T
            torch.testing.assert_close(shared, logps.detach(), atol=1e-9, rtol=1e-9)
    want_loss = pair_loss(logps)
    want_loss.backward()
    want = trained_gradient(model)
    assert loss == pytest.approx(float(want_loss), rel=1e-9)
    assert (got - want).norm() < 1e-9 * want.norm()
    for chunk_len in (8, 13):
        loss, got = shared_gradient(model, chunk_len)
        assert loss == pytest.approx(float(want_loss), rel=1e-9)
        assert (got - want).norm() < 1e-9 * want.norm()


def test_prompts_of_one_token_alone():
    model = tune(random_model("x070"))
    groups = [([5], [[3, 4, 0], [2, 0]]), ([9], [[1, 0], [7, 7, 0]])]
    forks = fork(groups)
    logps = forks.per_answer(score_forks(model, forks).logps)
    want = [
        model.token_logprobs(torch.tensor([p + a[:-1]]), torch.tensor([a])).sum()
        for p, answers in groups
        for a in answers
    ]
    torch.testing.assert_close(logps, torch.stack(want), atol=1e-5, rtol=1e-5)
    for chunk_len in (0, 2):
        model.zero_grad()
        (-score_forks(model, forks, chunk_len).logps.sum()).backward()
        assert trained_gradient(model).norm() > 0


def test_in_float32_with_other_company():
    """A pair's log-probabilities do not depend on its batch-mates: 1e-6 of their size."""
    model = random_model("x070")
    together = fork(GROUPS)
    together = together.per_answer(score_forks(model, together).logps)
    for i, group in enumerate(GROUPS):
        alone = fork([group])
        torch.testing.assert_close(
            alone.per_answer(score_forks(model, alone).logps),
            together[2 * i : 2 * i + 2],
            atol=1e-5,
            rtol=1e-6,
        )


# ----------------------------------------------------------------------------------------------
# runs


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(0)
    model = RWKV(RWKVConfig("x070", 2, 64, 257))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.05 * torch.randn_like(p)
    model.save_pretrained(folder / "base.pth")
    write(
        folder / "pairs.jsonl",
        *(
            {
                "prompt": [{"role": "user", "content": f"{a} {i}"}],
                "chosen": a * (1 + i % 3),
                "rejected": "no" * (1 + i % 2),
            }
            for i in range(5)
            for a in ("red", "blue", "green", "grey")
        ),
    )
    return folder


def tiny(base, out, **over):
    return Config(
        **{
            **dict(
                data=str(base / "pairs.jsonl"),
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


@pytest.mark.parametrize("tune", ["full", "lora", "state"])
def test_before_the_first_step_ln2_and_no_margin_exactly(tune, base, tmp_path):
    train_dpo.main(
        tiny(
            base,
            tmp_path / tune,
            tune=tune,
            val_data=str(base / "pairs.jsonl"),
            max_steps=3,
            global_bsz=8,
            micro_bsz=4,
        )
    )
    log = rows(tmp_path / tune)
    for row, end in ((log[0], "val_"), (log[1], "")):
        assert (
            row[f"{end}rewards/margins"]
            == row[f"{end}rewards/chosen"]
            == row[f"{end}rewards/accuracies"]
            == 0.0
        )
        assert row["val_loss" if end else "loss"] == pytest.approx(math.log(2), abs=2e-7)
    assert log[-1]["rewards/margins"] > 0 and log[-1]["val_rewards/accuracies"] > 0.5
    assert all(
        key in log[1]
        for key in (
            "rewards/chosen",
            "rewards/rejected",
            "rewards/margins",
            "rewards/accuracies",
            "logps/chosen",
            "logps/rejected",
            "mean_token_accuracy",
        )
    )


def test_loss_does_not_depend_on_micro_batch_chunks_or_processes(base, tmp_path):
    over = dict(nll_coef=0.5, val_data=str(base / "pairs.jsonl"))
    for name, more in {
        "1x8": {},
        "1x1": dict(micro_bsz=1),
        "1x2": dict(micro_bsz=2),
        "chunks": dict(chunk_len=7),
    }.items():
        train_dpo.main(tiny(base, tmp_path / name, **over, **more))
    # In chunks, too, DDP sees every parameter.
    cfg = tiny(base, tmp_path / "2x2", micro_bsz=2, chunk_len=7, **over)
    done = torchrun("train_dpo.py", cfg, nproc=2)
    assert done.returncode == 0, done.stderr
    want = rows(tmp_path / "1x8")
    for name in ("1x1", "1x2", "chunks", "2x2"):
        for a, b in zip(rows(tmp_path / name), want, strict=True):
            for key in b.keys() - {"time", "tokens_per_s", "step", "lr"}:
                first = (
                    a["step"] <= 1
                )  # before any step: the losses themselves; later Adam enlarges rounding
                assert a[key] == pytest.approx(
                    b[key], rel=1e-5 if first else 1e-3, abs=1e-6 if first else 1e-4
                ), (name, a["step"], key)


def test_the_reference_is_kept_and_known_to_be_stale(base, tmp_path, capsys):
    data = tmp_path / "p.jsonl"
    data.write_text((base / "pairs.jsonl").read_text())
    train_dpo.main(tiny(base, tmp_path / "a", data=str(data)))
    assert "reference: computing" in capsys.readouterr().out
    kept = torch.load(f"{data}.ref.pt", weights_only=True)["logps"]
    model, pairs = (
        RWKV.from_pretrained(base / "base.pth"),
        read_preferences(data, BYTES, 4096),
    )
    for row, both in list(zip(pairs, kept, strict=False))[::7]:
        for answer, logp in zip(row.answers, both, strict=False):
            ids = torch.tensor([row.prompt + answer])
            assert float(
                model.token_logprobs(ids[:, :-1], ids[:, 1:])[0, len(row.prompt) - 1 :].sum()
            ) == pytest.approx(float(logp), rel=1e-5)
    train_dpo.main(tiny(base, tmp_path / "b", data=str(data), lr=1e-4))
    said = capsys.readouterr().out
    assert f"reference: {data}.ref.pt\n" in said and "computing" not in said
    write(data, *(json.loads(line) for line in data.read_text().splitlines()[1:]))
    train_dpo.main(tiny(base, tmp_path / "c", data=str(data)))
    assert "again: it is of other data, weights or batches" in capsys.readouterr().out
    train_dpo.main(
        tiny(base, tmp_path / "d", data=str(data), reference=str(tmp_path / "c/rwkv-final.pth"))
    )
    assert "again: it is of other data, weights or batches" in capsys.readouterr().out
    assert (
        rows(tmp_path / "d")[0]["rewards/margins"] < -1e-4
    )  # the trained reference prefers the chosen ones, the base not yet


@pytest.mark.parametrize("tune", ["full", "lora", "state"])
def test_resume_is_bit_for_bit(tune, base, tmp_path):
    over = dict(
        tune=tune,
        val_data=str(base / "pairs.jsonl"),
        eval_every=2,
        save_every=2,
        max_steps=6,
        patience=5,
    )
    whole, parts = (tiny(base, tmp_path / name, **over) for name in ("whole", "parts"))
    train_dpo.main(whole)
    kill_after(parts, 3, train_dpo.main)
    train_dpo.main(tiny(base, tmp_path / "parts", **over, resume=True))
    a, b = (
        torch.load(tmp_path / name / "last.pt", weights_only=True) for name in ("whole", "parts")
    )
    assert (a["best_loss"], a["waited"]) == (b["best_loss"], b["waited"])
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])


@pytest.mark.parametrize(
    "tune, file",
    [("full", "rwkv-final.pth"), ("lora", "lora-final.safetensors"), ("state", "state-final.pth")],
)
def test_stops_early_and_goes_back_to_the_best(tune, file, base, tmp_path):
    scores = iter([0.1, 0.5, 0.9, 0.8, 0.7, 0.6, 0.5])
    (tmp_path / "c.py").write_text("")
    cfg = tiny(
        base,
        tmp_path / "run",
        tune=tune,
        eval_fn=lambda model, tokenizer: {"mine": next(scores)},
        watch="mine",
        patience=2,
        eval_every=1,
        max_steps=50,
        keep_last=0,
        save_every=1,
    )
    train_dpo.main(cfg)
    assert [row["mine"] for row in rows(tmp_path / "run")] == [0.1, 0.5, 0.9, 0.8, 0.7]
    idx, suffix = torch.arange(20)[None], file[file.index(".") :]
    final, best, later = (
        load_model(tmp_path / "run" / name)[0](idx)[0]
        for name in (file, f"best{suffix}", file.replace("final", "3"))
    )
    assert torch.equal(final, best) and not torch.equal(final, later)


def test_a_run_that_stops_early_says_so_also_without_a_best(base, tmp_path, capsys):
    """A watched number that is NaN is never higher."""
    cfg = tiny(
        base,
        tmp_path / "run",
        eval_fn=lambda model, tokenizer: {"mine": math.nan},
        watch="mine",
        patience=2,
        eval_every=1,
        max_steps=9,
    )
    train_dpo.main(cfg)
    assert "stopped early: 2 validations without a higher mine" in capsys.readouterr().out
    assert rows(tmp_path / "run")[-1]["step"] == 2


def test_the_nll_term_lifts_the_chosen_answer(base, tmp_path):
    """One pair, 200 steps: with the term the chosen log-probability rises; without, it is
    logged."""
    write(tmp_path / "one.jsonl", {"prompt": "a", "chosen": "xyz", "rejected": "xyw"})
    for alpha in (1.0, 0.0):
        train_dpo.main(
            tiny(
                base,
                tmp_path / str(alpha),
                data=str(tmp_path / "one.jsonl"),
                nll_coef=alpha,
                micro_bsz=1,
                global_bsz=1,
                max_steps=200,
                log_every=50,
            )
        )
    with_term, without = rows(tmp_path / "1.0"), rows(tmp_path / "0.0")
    assert with_term[-1]["logps/chosen"] > with_term[0]["logps/chosen"] + 5
    assert (
        with_term[-1]["logps/chosen"] > without[-1]["logps/chosen"]
        and without[-1]["rewards/margins"] > 0.5
    )


@pytest.mark.parametrize(
    "over, words",
    [
        (dict(init_from=""), "which model"),
        (dict(data="no.jsonl"), "no.jsonl does not exist"),
        (dict(reference="OTHER"), "vocabulary of 300.*one of 257"),
        (dict(reference="WORDS/m.pth"), "WORDS/m.pth has the tokenizer integers:255"),
        (dict(reference="none"), "is for --loss_type=simpo"),
        (dict(reference="off"), "tune=full has neither"),
        (dict(data="KWISE"), "DPO wants chosen and rejected"),
        (dict(loss_type="ipo", label_smoothing=0.1), "label_smoothing"),
        (dict(patience=1), "watch=val_rewards/accuracies is not among what is measured"),
        (dict(ctx_len=5), "holds nothing to train on"),
    ],
)
def test_bad_input(over, words, base, tmp_path):
    RWKV(RWKVConfig("x070", 1, 64, 300)).save_pretrained(tmp_path / "OTHER")
    RWKV(RWKVConfig("x070", 1, 64, 257)).save_pretrained(tmp_path / "WORDS/m.pth")
    (tmp_path / "WORDS/config.json").write_text('{"tokenizer": "integers:255"}')
    write(tmp_path / "KWISE", {"prompt": "x", "responses": ["a", "b"], "scores": [1, 2]})
    files = ("OTHER", "KWISE", "WORDS/m.pth")
    over = {k: str(tmp_path / v) if v in files else v for k, v in over.items()}
    with pytest.raises(UserError, match=words):
        train_dpo.main(tiny(base, tmp_path / "run", **over))


@pytest.mark.parametrize(
    "kept",
    [
        5,
        {"fingerprint": ""},
        {"fingerprint": "", "logps": 5},
        {"fingerprint": "", "logps": torch.zeros(2)},
        {"fingerprint": "", "logps": torch.zeros(2, 3)},
        {"fingerprint": "", "logps": torch.full((2, 2), math.nan)},
        {"fingerprint": "", "logps": torch.zeros(2, 2).to_sparse()},
    ],
)
def test_a_kept_reference_that_is_none_is_refused(kept, tmp_path):
    path = tmp_path / "a.ref.pt"
    torch.save({"fingerprint": "", "logps": torch.ones(2, 2)}, path)
    assert torch.equal(train_dpo.read_reference(path, "", 2), torch.ones(2, 2))
    assert train_dpo.read_reference(path, "of other data", 2) is None
    assert train_dpo.read_reference(path, "", 3) is None
    torch.save(kept, path)
    with pytest.raises(UserError, match="a.ref.pt does not hold a number per answer; remove it"):
        train_dpo.read_reference(path, "", 2)
