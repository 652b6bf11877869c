"""The same numbers, faster: other parts of the network than the recurrence, with a native form.

model.py reads as the papers write; what it calls here gives the numbers of the plain formula that
stands beside the call, in fewer passes over memory: products through oneDNN; token mixing, what
lies between products and recurrence, and the end of the loss in C++ (train_cpu.cpp); one token
through the whole network in C++ (step_cpu.cpp).
Everything has a PyTorch form that takes over where the C++ is not built.
"""

import contextlib
import ctypes
import functools
import math
from pathlib import Path

import torch
import torch.nn.functional as F

from . import cpu, native
from .casts import cast, copy_in_use

# ----------------------------------------------------------------------------------------------
# matrix products


def prefers_onednn():
    """Whether float32 products go through oneDNN: on processors that are not Intel's, where MKL,
    which PyTorch takes, may need twice as long. On Intel's the two are equally fast."""
    if not torch.backends.mkldnn.is_available():
        return False
    with contextlib.suppress(OSError):
        return "GenuineIntel" not in Path("/proc/cpuinfo").read_text(errors="replace")
    return False


ONEDNN = prefers_onednn()  # asked here: torch.compile would stop at it
# Rows of a product at a time. oneDNN keeps code and memory for every shape that it has seen, and
# packed batches have another number of rows at each step: gigabytes, if they came as they are. What
# is left over comes with zeros, as the next power of two.
PIECES = (4096, 1024, 256)


def linear(x, w):
    """x [..., in], w [out, in] -> x w' [..., out]; an error if they do not fit."""
    is_cpu = x.device.type == "cpu" and x.dtype == w.dtype == torch.float32
    if ONEDNN and is_cpu and not native.is_exported() and is_large(x, w):
        native.check("w", w, (*w.shape[:1], *x.shape[-1:]), cpu.FLOATS, x.device)
        return OneDNN.apply(x, w)
    return F.linear(x, w)


def is_large(x, w):
    """Whether a product gains by oneDNN. torch.compile is not asked for rows that may change."""
    if native.is_traced() or x.shape[:-1].numel() >= PIECES[-1]:
        return w.numel() >= 2**13
    return w.numel() >= 2**16


class OneDNN(torch.autograd.Function):
    """x w' in float32 on a CPU."""

    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return product(x, w)

    @staticmethod
    def backward(ctx, dy):
        x, w = ctx.saved_tensors
        dx = product(dy, w.mT) if ctx.needs_input_grad[0] else None
        dw = weight_gradient(dy, x) if ctx.needs_input_grad[1] else None
        return dx, dw


def product(x, w):
    """x [..., in], w [out, in] -> x w' [..., out], without a gradient."""
    rows = x.reshape(-1, x.shape[-1])
    if not ONEDNN or not x.is_cpu or not x.dtype == w.dtype == torch.float32:
        return F.linear(x, w)
    if native.is_traced():  # torch.compile's own form of oneDNN's op takes constant weights alone
        return product_op(rows, w).view(*x.shape[:-1], len(w))
    return by_rows(rows, w).view(*x.shape[:-1], len(w))


def pieces(n, sizes):
    """Yield (a, b) for the pieces of n rows, the largest of these sizes first, and for the rest."""
    a = 0
    for size in sizes:
        while a + size <= n:
            yield a, a + size
            a += size
    if a < n:
        yield a, n


def padded(x):
    """x [M, ...] with rows of zeros after it, so that M is a power of two."""
    more = (1 << (len(x) - 1).bit_length()) - len(x)
    return F.pad(x, (0, 0, 0, more)) if more else x


def by_rows(x, w):
    """x [M, in], w [out, in] -> x w'"""
    if len(x) in PIECES or 0 < len(x) < PIECES[-1]:
        return onednn(padded(x), w)[: len(x)]
    y = x.new_empty(len(x), len(w))
    for a, b in pieces(len(x), PIECES):
        y[a:b] = onednn(padded(x[a:b]), w)[: b - a]
    return y


def weight_gradient(dy, x):
    """dy [..., out], x [..., in] -> dy' x [out, in], without a gradient."""
    # Views, such as the gradient of a sum, take oneDNN a thousand times as long.
    dy = dy.reshape(-1, dy.shape[-1]).contiguous()
    x = x.reshape(-1, x.shape[-1]).contiguous()
    if not ONEDNN or not x.is_cpu or not x.dtype == dy.dtype == torch.float32:
        return dy.mT @ x
    if native.is_traced():
        return weight_gradient_op(dy, x)
    return sum_over_rows(dy, x)


def sum_over_rows(dy, x):
    """dy [M, out], x [M, in] -> dy' x [out, in]"""
    if dy.shape[1] > x.shape[1]:  # oneDNN copies its first matrix if that is turned
        return sum_over_rows(x, dy).mT
    total = x.new_zeros(dy.shape[1], x.shape[1])
    for a, b in pieces(len(x), PIECES[1:]):  # it is faster in pieces that stay in the cache
        total += onednn(padded(dy[a:b]).mT, padded(x[a:b]).mT)
    return total


def onednn(x, w):
    return torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], "")


@torch.library.custom_op("gosling::product", mutates_args=())
def product_op(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return by_rows(x, w)


@product_op.register_fake
def product_shape(x, w):
    return x.new_empty(x.shape[0], w.shape[0])  # len() would be a constant to torch.compile


@torch.library.custom_op("gosling::weight_gradient", mutates_args=())
def weight_gradient_op(dy: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    return sum_over_rows(dy, x).contiguous()


@weight_gradient_op.register_fake
def weight_gradient_shape(dy, x):
    return x.new_empty(dy.shape[1], x.shape[1])


# ----------------------------------------------------------------------------------------------
# what lies between products


def one_pass(x, head_size=64):
    """The module with the form of the functions below that takes x: cpu, between, or None."""
    form = None
    if cpu.fits(x):
        form = cpu
    elif takes_triton(x):
        form = between_on(x.device)
    return form if form and head_size in form.HEAD_SIZES else None


def wanted_by(form, parameters, dtype):
    """Parameters as a form takes them: in the dtype of the vectors, but between.py reads any."""
    if form not in (None, cpu):
        return parameters
    return [p if p is None else cast(p, dtype) for p in parameters]


_between = {}  # of each device: between.py, or None where it does not work


def between_on(device):
    """between.py; None, and a line that says why, where it does not work."""
    if device not in _between:
        try:
            from . import between

            _between[device] = between  # the trial comes here again
            missing = between.trial(device)
        except ImportError as error:
            missing = str(error)
        if missing:
            native.say(f"what lies between products runs in PyTorch, slower: {missing}")
            _between[device] = None
    return _between[device]


class Fused(torch.autograd.Function):
    """A function of train_cpu.cpp or between.py, the `form`: one pass over memory, and one in
    backward. `cpu.fused` says what the arguments are; tensors: the vectors, then the parameters."""

    @staticmethod
    def forward(ctx, form, name, number, n_vectors, n_results, *tensors):
        ctx.save_for_backward(*tensors)
        ctx.about = form, name, number, n_vectors, n_results
        vectors, parameters = tensors[:n_vectors], tensors[n_vectors:]
        return tuple(form.fused(name, number, vectors, parameters, n_results))

    @staticmethod
    def backward(ctx, *grads):
        form, name, number, n_vectors, n_results = ctx.about
        tensors = ctx.saved_tensors  # read once: under checkpointing this is what recomputes
        vectors, parameters = tensors[:n_vectors], tensors[n_vectors:]
        out = form.fused(name, number, vectors, parameters, n_results, list(grads))
        return None, None, None, None, None, *out


def token_shift(x, shift, cu_seqlens):
    """model.token_shift in one pass where there is Triton, else None. cu_seqlens: packed.CuSeqlens,
    or None."""
    if one_pass(x) in (None, cpu):
        return None
    from .shift import TokenShift

    borders = None if cu_seqlens is None else cu_seqlens.device
    return TokenShift.apply(x, shift, borders)


def mix(x, x_prev, *weights, offsets=None):
    """x and the token before, x_prev [B, T, C]; weights [1, 1, C] -> [x + (x_prev - x) m, ...]

    offsets: as many [B, T, C], and each m is m + its offset.
    ValueError for shapes that do not fit: PyTorch would repeat what is too short.
    """
    J, form = len(weights), one_pass(x)
    weights = wanted_by(form, weights, x.dtype)
    if form:
        offsets = [None] * J if offsets is None else offsets
        return Fused.apply(form, "mix", J, 2 + J, J, x, x_prev, *offsets, *weights)
    if x_prev.shape != x.shape or any(m.numel() != x.shape[-1] for m in weights):
        shapes = [tuple(t.shape) for t in (x, x_prev, *weights)]
        raise ValueError(
            f"mix: x, x_prev and weights are {shapes}, expected [B, T, C] and [1, 1, C]"
        )
    delta = x_prev - x
    if offsets is not None:
        weights = [m + h for m, h in zip(weights, offsets, strict=True)]
    return [torch.addcmul(x, delta, m) for m in weights]


def gates7(k, v, v_first, w, a, v_gate, w0, a0, v0, k_k, k_a, head_size):
    """What lies between RWKV-7's products and its recurrence. All [B, T, C], and [1, 1, C]:

      log w = -exp(-1/2) sigmoid(w0 + w)      the decay w is in (0.545, 1)
      a     = sigmoid(a0 + a)                 the in-context learning rate
      v     = v + (v_first - v) sigmoid(v0 + v_gate)      the value residual, unless v_first is None
      kappa = k * k_k, each head of unit length           the removal key
      k     = k (1 + (a - 1) k_a)

    -> log w, in float32, k, v, -kappa, kappa * a: what wkv7 takes.
    """
    form = one_pass(k, head_size)
    a0, k_k, k_a, v0 = wanted_by(form, (a0, k_k, k_a, v0), k.dtype)
    w0 = as_float32(w0)
    if form:
        of_residual = (v, v_first, v_gate, v0) if v_first is not None else (None, None, None, None)
        v_in, v_first, v_gate, v0 = of_residual
        tensors = (k, v_in, v_first, w, a, v_gate, w0, a0, k_k, k_a, v0)
        results = Fused.apply(form, "gates7", head_size, 6, 5, *tensors)
        logw, k, v_out, minus_kappa, kappa_a = results
        return logw, k, v if v_first is None else v_out, minus_kappa, kappa_a
    a = torch.sigmoid(a0 + a)
    logw = -math.exp(-0.5) * torch.sigmoid(w0 + w)
    if v_first is not None:
        v = torch.lerp(v, v_first, torch.sigmoid(v0 + v_gate))
    kappa = F.normalize((k * k_k).unflatten(-1, (-1, head_size)), dim=-1).flatten(-2)
    k = k * (1 + (a - 1) * k_a)
    return logw, k, v, -kappa, kappa * a


def readout(y, g, norm, r=None, k=None, v=None, r_k=None):
    """What lies between the recurrence and the last product -> [B, T, C]

      (layer norm of each head of y, weight and bias of `norm`, + (r . (r_k * k)) v) * g

    y r k v [B, T, H, N], g [B, T, C], r_k [H, N]; without r, k, v and r_k there is no sum, as in
    RWKV-6.
    """
    head_size = y.shape[-1]
    form = one_pass(y, head_size)
    weight, bias, r_k = wanted_by(form, (norm.weight, norm.bias, r_k), y.dtype)
    if form:
        vectors = [t if t is None else t.flatten(2) for t in (y, g, r, k, v)]
        return Fused.apply(form, "readout", head_size, 5, 1, *vectors, weight, bias, r_k)[0]
    z = F.layer_norm(y, y.shape[-1:], eps=64e-5).flatten(2)
    z = torch.addcmul(bias, z, weight)  # bias + z * weight
    if r is not None:
        bonus = (r * k * r_k).sum(-1, keepdim=True) * v  # the current token, by itself
        z = z + bonus.flatten(2)
    return z * g


def relu_squared(x):
    """max(x, 0)^2"""
    form = one_pass(x)
    return ReluSquared.apply(form, x) if form else torch.relu(x) ** 2


class ReluSquared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, form, x):
        ctx.save_for_backward(x)
        ctx.form = form
        return form.relu_squared(x)

    @staticmethod
    def backward(ctx, dout):
        (x,) = ctx.saved_tensors
        return None, ctx.form.relu_squared(x, dout)


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
    form = score_in_triton(h.device) if takes_triton(h) else ScoreTokens
    copy = copy_in_use(weight, h.dtype)
    copy = None if copy is None else copy.detach()  # the gradient is the weight's, in its dtype
    return form.apply(h, weight, targets, temperature, l2wrap, copy)


def takes_triton(h):
    """Whether Triton may take it: on CUDA, with content, and not while torch.compile records."""
    if native.is_traced():  # len() would be a constant to it
        return False
    is_plain = type(h) is torch.Tensor and h.is_cuda and len(h) > 0
    return is_plain and h.dtype != torch.float64


@functools.cache
def score_in_triton(device):
    """head.py's ScoreTokens; ours, and a line that says why, where it does not work."""
    try:
        from . import head

        missing = head.trial(device)
    except ImportError as error:
        missing = str(error)
    if missing:
        native.say(f"the head's loss runs in PyTorch, slower, not in Triton: {missing}")
        return ScoreTokens
    return head.ScoreTokens


class ScoreTokens(torch.autograd.Function):
    """A few rows of logits at a time, recomputed in backward. With z and p = softmax(z):

    d logp_y / dz = onehot(y) - p          d entropy / dz = -p (log p + entropy)

    copy: of the weight in the dtype of h, if one is kept; else it is cast, in backward again.
    """

    @staticmethod
    def rows_at_a_time(h, weight):
        """16 MB of float32 logits on a CPU, 256 MB on a GPU.

        Fewer than 256 rows make the gradient of the weight the slowest part.
        """
        return max(256, (2**26 if h.is_cuda else 2**22) // len(weight))

    @staticmethod
    def forward(ctx, h, weight, targets, temperature, l2wrap, copy=None):
        w = weight.to(h.dtype) if copy is None else copy
        n = ScoreTokens.rows_at_a_time(h, weight)
        scores = []
        for x, y in zip(h.split(n), targets.split(n), strict=True):
            z = as_float32(product(x, w))
            scores.append(cpu.score_rows(z, y, temperature) or score_rows(z / temperature, y))
        logps, entropy, hits, lse = (torch.cat(column) for column in zip(*scores, strict=True))
        ctx.save_for_backward(h, weight, targets, lse, entropy, copy)
        ctx.temperature, ctx.l2wrap = temperature, l2wrap
        ctx.mark_non_differentiable(hits)
        ctx.set_materialize_grads(False)
        return logps, entropy, hits

    @staticmethod
    def backward(ctx, dlogps, dentropy, _):
        h, weight, targets, lse, entropy, copy = ctx.saved_tensors
        w = weight.to(h.dtype) if copy is None else copy
        n = ScoreTokens.rows_at_a_time(h, weight)
        dlogps = torch.zeros_like(lse) if dlogps is None else dlogps
        dh = torch.empty_like(h) if ctx.needs_input_grad[0] else None
        dw = torch.zeros_like(weight) if ctx.needs_input_grad[1] else None
        for i in range(0, len(h), n):
            q = slice(i, i + n)
            z = as_float32(product(h[q], w))
            scores = (None, entropy[q], None, lse[q])
            grads = (dlogps[q], None if dentropy is None else dentropy[q])
            if cpu.score_rows(z, targets[q], ctx.temperature, scores, grads, ctx.l2wrap):
                dz = z  # the C++ writes the gradient in place of the logits
            else:
                dz = score_rows_backward(z, targets[q], scores, grads, ctx.temperature, ctx.l2wrap)
            dz = dz.to(h.dtype)
            if dh is not None:
                dh[q] = product(dz, w.mT)
            if dw is not None:
                dw += weight_gradient(dz, h[q])
        return dh, dw, None, None, None, None


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
