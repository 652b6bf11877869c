"""LoRAs and tuned states into a base's weights, for export.py."""

import math
import re

from gosling.config import UserError, warn
from gosling.tune import shape_of
from gosling.weights import (
    check_base,
    check_numbers,
    digest_of,
    expected_shapes,
    read_metadata,
    read_weights,
    same_size,
    state_description,
    state_names,
    state_shape,
    tensor_problems,
)
from wkv_cuda.fused import as_float32


def check_origin(weights, config, cfg, state=""):
    """UserError if the adapter or the state was trained on other weights than these."""
    abouts = {}
    if cfg.adapter:
        abouts[cfg.adapter] = read_metadata(cfg.adapter)
    if state:
        abouts[state] = state_description(state)
    says = any("fingerprint" in about for about in abouts.values())
    if not says or tensor_problems(weights, expected_shapes(config, weights)):
        return  # what does not fit is named where it is merged
    shapes = expected_shapes(config)
    network = {name: w.reshape(shapes[name]) for name, w in weights.items() if name in shapes}
    base = digest_of(network)
    for path, about in abouts.items():
        check_base(path, about, base, cfg.model, cfg.another_base)


def scale_of(cfg, metadata):
    """-> (alpha, rslora) of a LoRA; a flag that says otherwise than its file is a UserError."""
    if cfg.alpha is None and "alpha" not in metadata:
        raise UserError(
            f"{cfg.adapter} does not say its alpha; give the --alpha that it was trained with "
            "(RWKV-PEFT: lora_alpha of its command line, by default 32)"
        )
    if "alpha" not in metadata:
        return cfg.alpha, cfg.rslora
    alpha, rslora = float(metadata["alpha"]), metadata.get("rslora") == "True"
    if cfg.alpha not in (None, alpha) or (cfg.rslora and not rslora):
        flags = f"--alpha={cfg.alpha:g}" if cfg.alpha not in (None, alpha) else "--rslora"
        raise UserError(
            f"{flags}, but {cfg.adapter} was trained with alpha {alpha:g}, rslora {rslora}; leave "
            "the flag out"
        )
    return alpha, rslora


def merge_lora(weights, cfg):
    """W <- W + scale B A in `weights`, computed in float32; other tensors replace the base's."""
    adapter = read_weights(cfg.adapter)
    if not any(name.endswith(".lora_A") for name in adapter):
        raise UserError(
            f"{cfg.adapter} is not a LoRA, it has no lora_A but {', '.join(list(adapter)[:2])} …; "
            "a tuned state goes to --state"
        )
    alpha, rslora = scale_of(cfg, read_metadata(cfg.adapter))
    check_numbers(adapter, cfg.adapter)
    for name in sorted({re.sub(r"lora_[AB]$", "weight", name) for name in adapter}):
        if name == "score.weight":  # a reward model's head, which the base has not
            weights[name] = adapter[name]
            continue
        matrix, old, extra = name.removesuffix(".weight"), weights.get(name), adapter.get(name)
        A, B = adapter.get(f"{matrix}.lora_A"), adapter.get(f"{matrix}.lora_B")
        if not fits(old, A, B, extra):
            raise UserError(
                f"{cfg.adapter} belongs to another base, or is not whole: {name}, {shape_of(old)} "
                f"in {cfg.model}, has lora_A {shape_of(A)}, lora_B {shape_of(B)}, replacement "
                f"{shape_of(extra)} here; give the --model it was trained on"
            )
        w = as_float32(old if extra is None else extra).reshape(old.shape)
        if A is not None:
            scale = alpha / (math.sqrt(len(A)) if rslora else len(A))
            w = w + scale * (as_float32(B) @ as_float32(A))
        weights[name] = w if cfg.dtype else w.to(old.dtype)  # `cast` goes to cfg.dtype from float32
    print(f"{cfg.adapter}: {len(adapter)} tensors merged, alpha {alpha:g}, rslora {rslora}")


def fits(old, A, B, extra):
    """Whether a base's tensor can take lora_A, lora_B and a replacement; each may be None."""
    if old is None or (A is None) != (B is None):
        return False
    if extra is not None and not same_size(extra.shape, old.shape):
        return False
    return A is None or (*B.shape, *A.shape) == (len(old), len(A), len(A), old.shape[-1])


def merge_state(weights, config, cfg):
    """blocks.{i}.att.time_state [H, N, N] of each layer into `weights`."""
    state = read_weights(cfg.state)
    check_numbers(state, cfg.state)
    expected = dict.fromkeys(state_names(config.n_layer), state_shape(config))
    problems = tensor_problems(state, expected)
    if problems:
        raise UserError(
            f"{cfg.state} does not fit {cfg.model}: {problems[0]}; give the --model it was tuned on"
        )
    weights.update(state)
    if config.version == "x070":
        warn(
            "the rwkv package silently ignores a state inside an RWKV-7 file; ship the state file "
            "beside the model, and give it to the engine as the initial state"
        )
