"""The losses against TRL's own code (`pip install trl==1.16.0` and these run; it is not in
requirements.txt)."""

import itertools
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("trl", reason="pip install trl==1.16.0 to compare with it")
from train_dpo import dpo_loss
from train_grpo import policy_loss

from helpers import LP, MASK, OLD, REDUCTIONS, REF, SAID, A
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer

ALONE = SimpleNamespace(
    gather=lambda x: x,
    gather_for_metrics=lambda x: x,
    reduce=lambda x, reduction: x,
    num_processes=1,
    device="cpu",
    unwrap_model=lambda m: m,
)


@pytest.mark.parametrize(
    "loss_type, level", list(itertools.product(REDUCTIONS, ("token", "sequence")))
)
@pytest.mark.parametrize(
    "more",
    [{}, dict(delta=1.4), dict(beta=0.3), dict(corrected=True), dict(on_policy=True)],
    ids=str,
)
def test_policy_loss_is_trls(loss_type, level, more):
    beta, high, on_policy = (
        more.get("beta", 0.0),
        1.5 if loss_type == "cispo" else 0.28,
        "on_policy" in more,
    )
    mask, A_ = torch.tensor(MASK), torch.tensor(A, dtype=torch.float64)
    weights = (OLD - SAID).exp().clamp(max=3.0)
    theirs, ours = LP.clone().requires_grad_(), LP.clone().requires_grad_()
    me = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (theirs, torch.zeros_like(theirs), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level=level,
        beta=beta,
        loss_type=loss_type,
        epsilon_low=0.2,
        epsilon_high=high,
        use_vllm="corrected" in more,
        vllm_importance_sampling_correction=True,
        args=SimpleNamespace(
            delta=more.get("delta"), use_bias_correction_kl=False, steps_per_generation=1
        ),
        max_completion_length=7,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        accelerator=ALONE,
        _entropy_bonus_enabled=False,
        _metrics=defaultdict(lambda: defaultdict(list)),
    )
    inputs = dict(
        prompt_ids=torch.zeros(5, 1),
        prompt_mask=torch.ones(5, 1),
        completion_ids=torch.zeros(5, 6),
        completion_mask=mask,
        advantages=A_,
        old_per_token_logps=None if on_policy else OLD,
        ref_per_token_logps=REF,
        importance_sampling_ratio=weights,
        num_items_in_batch=mask.sum(),
    )
    want = GRPOTrainer._compute_loss(me, None, inputs)
    got, said = policy_loss(
        ours,
        None if on_policy else OLD,
        A_,
        mask,
        loss_type=loss_type,
        importance_sampling_level=level,
        epsilon_high=high,
        delta=more.get("delta"),
        beta=beta,
        ref_logps=REF if beta else None,
        max_new_tokens=7,
        sampling_logps=SAID if "corrected" in more else None,
    )
    torch.testing.assert_close(got, want, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        *(torch.autograd.grad(loss, x)[0] for loss, x in ((got, ours), (want, theirs))),
        rtol=0,
        atol=1e-9,
    )
    if level == "token":  # at sequence level TRL's mean is over rows, ours over tokens
        for name in (
            "clip_ratio/low_mean",
            "clip_ratio/high_mean",
            "clip_ratio/region_mean",
            "cispo_clip_ratio",
            "kl",
        ):
            if name in said and not (
                "delta" in more and name.startswith("clip")
            ):  # TRL looks at the ratio after delta
                assert said[name] == pytest.approx(me._metrics["train"][name][0], abs=1e-6), name


@pytest.mark.parametrize("loss_type", ["sigmoid", "hinge", "ipo", "robust"])
def test_dpo_loss_is_trls(loss_type):
    torch.manual_seed(0)
    smooth = 0.1 if loss_type == "robust" else 0.0  # TRL's sigmoid does not read it
    mask = torch.tensor(
        [[0, 1, 1, 1, 1], [0, 1, 1, 0, 0], [0, 1, 1, 1, 0], [0, 1, 0, 0, 0]]
    )  # chosen, chosen, rejected, rejected
    logps = (-torch.rand(4, 4, dtype=torch.float64) * mask[:, 1:]).requires_grad_()
    ref = torch.randn(4, dtype=torch.float64) - 2
    out = SimpleNamespace(log_probs=logps, entropy=torch.zeros_like(logps), logits=None)
    me = SimpleNamespace(
        model=SimpleNamespace(training=True),
        accelerator=ALONE,
        aux_loss_enabled=True,
        router_aux_loss_coef=1.0,
        ld_alpha=None,
        precompute_ref_logps=True,
        f_divergence_type="reverse_kl",
        loss_types=[loss_type],
        loss_weights=[1.0],
        beta=0.3,
        label_smoothing=smooth,
        use_weighting=False,
    )
    inputs = dict(
        input_ids=torch.zeros(4, 5, dtype=torch.long),
        completion_mask=mask,
        ref_chosen_logps=ref[:2],
        ref_rejected_logps=ref[2:],
    )

    class Stop(Exception):
        """carries the loss out: what TRL does after it wants a whole trainer"""

    class Aux:  # TRL adds its aux_loss last
        def __rmul__(self, weight):
            return self

        def __radd__(self, loss):
            raise Stop(loss)

    out.aux_loss = Aux()
    with pytest.raises(Stop) as stop:
        DPOTrainer._compute_loss(me, lambda **k: out, inputs, False)
    want = stop.value.args[0]
    c, r = logps.sum(1).chunk(2)
    lengths = mask.sum(1)
    got, _, _ = dpo_loss(
        c,
        r,
        ref[:2],
        ref[2:],
        beta=0.3,
        loss_type=loss_type,
        label_smoothing=smooth,
        chosen_len=lengths[:2],
        rejected_len=lengths[2:],
    )
    torch.testing.assert_close(got.mean(), want, rtol=0, atol=1e-9)
    torch.testing.assert_close(
        *(torch.autograd.grad(x, logps, retain_graph=True)[0] for x in (got.mean(), want)),
        rtol=0,
        atol=1e-9,
    )
