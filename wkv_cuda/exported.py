"""The recurrence as torch.export and torch.onnx record it: standard operators, any length.

A loop in Python would be unrolled at the length that it is traced with. This one is `scan`, a loop
that is part of the graph; ONNX has an operator of that name.
"""

import functools


def wkv(version, inputs, state):
    """Inputs as wkv_cuda.wkv7's or wkv6's, state in the dtype to compute in -> (y, state)."""
    # There is no public name for it up to torch 2.13.
    from torch._higher_order_ops.scan import scan

    tokens = [x.to(state.dtype).movedim(1, 0) for x in inputs if x.dim() == 4]  # [T, B, H, N]
    if version == 7:
        step = step7
    else:
        u = inputs[4].to(state.dtype)
        step = functools.partial(step6, u)
    if tokens[0].shape[0] == 1:  # no loop at all
        state, y = step(state, [x[0] for x in tokens])
        y = y[None]
    else:
        state, y = scan(step, state, tokens)
    return y.movedim(0, 1).to(inputs[0].dtype), state


def step7(S, token):
    """As in wkv_cuda.naive: S [B, H, N, N], the token's vectors [B, H, N] -> (S, y [B, H, N])."""
    r, logw, k, v, a, b = token
    removed = (S @ a[..., None]) * b[:, :, None]  # (S a) b'
    S = S * logw.exp()[:, :, None] + removed + v[..., None] * k[:, :, None]
    return S, (S @ r[..., None])[..., 0]


def step6(u, S, token):
    """The same; u [H, N]."""
    r, logw, k, v = token
    vk = v[..., None] * k[:, :, None]  # v k'
    y = ((S + u[:, None] * vk) @ r[..., None])[..., 0]
    return S * logw.exp()[:, :, None] + vk, y
