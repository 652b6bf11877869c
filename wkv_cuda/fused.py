"""The same numbers, faster: other parts of the network than the recurrence, with a native form.

model.py reads as the papers write; what it calls here gives the numbers of the plain formula that
stands beside the call, in fewer passes over memory: products through oneDNN, token mixing and the
end of the loss in C++ (train_cpu.cpp), one token through the whole network in C++ (step_cpu.cpp).
Everything has a PyTorch form that takes over where the C++ is not built.
"""

import contextlib
import ctypes

import torch
import torch.nn.functional as F

from . import cpu, native

HAS_ONEDNN = torch.backends.mkldnn.is_available()  # asked here: torch.compile would stop at it


def linear(x, w):
    """x [..., in], w [out, in] -> x w' [..., out]; an error if they do not fit."""
    # Small products gain nothing, and oneDNN keeps code for every shape that it has seen.
    is_large = x.dtype == w.dtype == torch.float32 and w.numel() >= 2**16
    if is_large and x.device.type == "cpu" and HAS_ONEDNN and not native.is_exported():
        native.check("w", w, (*w.shape[:1], *x.shape[-1:]), cpu.FLOATS, x.device)
        return OneDNN.apply(x, w)
    return F.linear(x, w)


class OneDNN(torch.autograd.Function):
    """x w' in float32 on a CPU.

    F.linear takes MKL, which on some CPUs needs half as long again as oneDNN; for the gradient of w
    they are equal.
    """

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return onednn(x, w)

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = onednn(dy, w.mT)
        if ctx.needs_input_grad[1]:
            dw = dy.flatten(0, -2).mT @ x.flatten(0, -2)
        return dx, dw


def onednn(x, w):
    """x w'. torch.compile's own form of that op takes constant weights alone, so it meets ours."""
    if native.is_traced():
        return onednn_op(x, w)
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


@torch.library.custom_op("gosling::onednn", mutates_args=())
def onednn_op(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


@onednn_op.register_fake
def onednn_shape(x, w):
    return x.new_empty((*x.shape[:-1], len(w)))


def mix(x, x_prev, *weights):
    """x and the token before, x_prev [B, T, C]; weights [1, 1, C] -> [x + (x_prev - x) m, ...]

    ValueError for shapes that do not fit: PyTorch would repeat what is too short.
    """
    weights = [m.to(x.dtype) for m in weights]
    if cpu.fits(x):
        return Mix.apply(x, x_prev, *weights)  # one pass over memory, and one in backward
    if x_prev.shape != x.shape or any(m.numel() != x.shape[-1] for m in weights):
        shapes = [tuple(t.shape) for t in (x, x_prev, *weights)]
        raise ValueError(
            f"mix: x, x_prev and weights are {shapes}, expected [B, T, C] and [1, 1, C]"
        )
    delta = x_prev - x
    return [torch.addcmul(x, delta, m) for m in weights]


class Mix(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, x_prev, *weights):
        ctx.save_for_backward(x, x_prev, *weights)
        return tuple(cpu.mix(x, x_prev, weights))

    @staticmethod
    def backward(ctx, *grads):
        x, x_prev, *weights = ctx.saved_tensors
        return tuple(cpu.mix(x, x_prev, weights, grads))


# ----------------------------------------------------------------------------------------------
# the head, scored without ever holding [B, T, V]


def score_tokens(h, weight, targets, temperature=1.0, l2wrap=0.0):
    """h [M, C], the head's weight [V, C], targets [M] -> logps, entropy, hits, each [M].

    With z = h weight' / temperature: logps = log_softmax(z) at the targets, entropy = that of
    softmax(z) in nats, both float32, and hits = argmax(z) == targets. l2wrap (upstream's L2Wrap,
    1e-4) pulls the largest logit down by l2wrap * its value for each unit of d loss / d logps,
    which keeps logits from drifting in bfloat16; it changes the gradient and never the loss.
    ValueError for shapes, or a dtype of the targets, that do not fit.
    """
    fits = h.dim() == weight.dim() == 2 and h.shape[1] == weight.shape[1] and len(weight) > 0
    if not fits or not h.is_floating_point() or weight.device != h.device:
        raise ValueError(
            f"h is {h.dtype} {tuple(h.shape)} and weight {tuple(weight.shape)} on {weight.device}, "
            f"expected floats [M, C] and [V, C] on {h.device}"
        )
    native.check("targets", targets, h.shape[:1], (torch.int64,), h.device)
    return ScoreTokens.apply(h, weight, targets, temperature, l2wrap)


class ScoreTokens(torch.autograd.Function):
    """A few rows of logits at a time, recomputed in backward. With z and p = softmax(z):

    d logp_y / dz = onehot(y) - p          d entropy / dz = -p (log p + entropy)
    """

    @staticmethod
    def rows_at_a_time(h, weight):
        """16 MB of float32 logits on a CPU, 256 MB on a GPU.

        Fewer than 256 rows make the gradient of the weight the slowest part.
        """
        return max(256, (2**26 if h.is_cuda else 2**22) // len(weight))

    @staticmethod
    def forward(ctx, h, weight, targets, temperature, l2wrap):
        w, n = weight.to(h.dtype), ScoreTokens.rows_at_a_time(h, weight)
        scores = []
        for x, y in zip(h.split(n), targets.split(n), strict=True):
            z = as_float32(linear(x, w))
            scores.append(cpu.score_rows(z, y, temperature) or score_rows(z / temperature, y))
        logps, entropy, hits, lse = (torch.cat(column) for column in zip(*scores, strict=True))
        ctx.save_for_backward(h, weight, targets, lse, entropy)
        ctx.temperature, ctx.l2wrap = temperature, l2wrap
        ctx.mark_non_differentiable(hits)
        ctx.set_materialize_grads(False)
        return logps, entropy, hits

    @staticmethod
    def backward(ctx, dlogps, dentropy, _):
        h, weight, targets, lse, entropy = ctx.saved_tensors
        w, n = weight.to(h.dtype), ScoreTokens.rows_at_a_time(h, weight)
        dlogps = torch.zeros_like(lse) if dlogps is None else dlogps
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for i in range(0, len(h), n):
            q = slice(i, i + n)
            z = as_float32(linear(h[q], w))
            scores = (None, entropy[q], None, lse[q])
            grads = (dlogps[q], None if dentropy is None else dentropy[q])
            if cpu.score_rows(z, targets[q], ctx.temperature, scores, grads, ctx.l2wrap):
                dz = z  # the C++ writes the gradient in place of the logits
            else:
                dz = score_rows_backward(z, targets[q], scores, grads, ctx.temperature, ctx.l2wrap)
            dz = dz.to(h.dtype)
            if dh is not None:
                dh[q] = linear(dz, w.mT)
            if dw is not None:
                dw += dz.mT @ h[q]
        return dh, dw, None, None, None


def score_rows(z, y):
    """Logits z [M, V], divided by the temperature, targets y [M] -> logps, entropy, hits, lse.

    Each is [M]; lse is the log of the sum of exponentials.
    """
    lse = z.logsumexp(-1)
    logps = z.gather(-1, y[:, None])[:, 0] - lse
    entropy = lse - ((z - lse[:, None]).exp_().mul_(z)).sum(-1)
    return logps, entropy, z.argmax(-1) == y, lse


def score_rows_backward(logits, y, scores, grads, temperature, l2wrap):
    """d loss / d logits [M, V], in place of the logits, from d loss / d logps and, or None,
    / d entropy, each [M]."""
    _, entropy, _, lse = scores
    dlogps, dentropy = grads
    if l2wrap:
        top, at = logits.max(-1, keepdim=True)
    logp = logits.div_(temperature).sub_(lse[:, None])
    factor = dlogps[:, None]
    if dentropy is not None:
        factor = torch.addcmul(factor, logp + entropy[:, None], dentropy[:, None])
    dz = logp.exp_().mul_(-factor).scatter_add_(-1, y[:, None], dlogps[:, None])
    dz /= temperature
    if l2wrap:
        dz.scatter_add_(-1, at, -l2wrap * top * dlogps[:, None])
    return dz


def as_float32(x):
    """x in float32; float64 stays, so that tests can run the whole network in it."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ----------------------------------------------------------------------------------------------
# generation, and what a CPU wants


def decoder(model):
    """One token through the whole network in one C++ call: step(ids [M], state) -> logits [M, V].

    The state is written in place. Good for as long as no weight is replaced. None where that is not
    possible: not on a CPU, not built, an adapter on, weights of several dtypes.
    """
    weights = {}
    for name, p in model.named_parameters():
        if not name.startswith(("score.", "tuned.")):
            weights[name] = p
    dtype = model.emb.weight.dtype
    has_adapter = any(".lora_" in name for name in weights)
    if model.emb.weight.device.type != "cpu" or has_adapter:
        return None
    if model.compute_dtype not in (None, dtype):
        return None
    return cpu.stepper(int(model.config.version[2]), list(weights.values()), model.config)


def build(device):
    """Build the native code now, so that evaluations before the first step run it, to the last bit.

    On CUDA the first call builds it.
    """
    if torch.device(device).type == "cpu":
        cpu.unavailable()


def keep_memory():
    """Let glibc keep what tensors free for the next ones.

    It gives large blocks back to the system at once, and taking them again, page by page, is up to
    a third of a small model's step.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another libc
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2**25)  # M_MMAP_THRESHOLD, at its largest
        libc.mallopt(-1, 2**30)  # M_TRIM_THRESHOLD
