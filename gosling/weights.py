"""Weights in and out: official `.pth` and `.safetensors` files, tuned states, and what they say."""

import errno
import hashlib
import json
import re
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from gosling.config import UserError
from gosling.files import atomic_write, load_torch, read_json, save_torch
from model import NEVER_TRAINED, RWKV, RWKVConfig

# ----------------------------------------------------------------------------------------------
# files of tensors


def is_safetensors(path):
    return Path(path).suffix in (".safetensors", ".st")


def read_weights(path):
    """{name: tensor} of a `.pth` or `.safetensors` file."""
    if is_safetensors(path):
        try:
            return load_file(path)
        except (SafetensorError, OSError) as e:
            raise UserError(f"{path} cannot be read as safetensors ({e})") from e
    weights = load_torch(path)
    is_flat = isinstance(weights, dict)
    if not is_flat or not all(isinstance(w, torch.Tensor) for w in weights.values()):
        raise UserError(
            f"{path} is not a file of weights (a flat dict of tensors); "
            "last.pt is for resuming, rwkv-*.pth holds weights"
        )
    return weights


def read_metadata(path):
    """The {str: str} that a .safetensors file carries beside its tensors; {} for a .pth."""
    if not is_safetensors(path):
        return {}
    with safe_open(path, "pt") as f:
        return f.metadata() or {}


def write_weights(weights, path, metadata=None):
    """`.pth` or `.safetensors` by the path's ending, atomically.

    metadata {str: str} goes into a .safetensors alone.
    """
    if not is_safetensors(path):
        save_torch(weights, path)
        return
    with atomic_write(path) as tmp:
        try:
            save_file(weights, tmp, metadata)
        except SafetensorError as e:
            raise OSError(errno.EIO, str(e)) from e


# ----------------------------------------------------------------------------------------------
# a whole network


def config_of(weights, path="the file"):
    """RWKVConfig from the tensors' names and shapes, never from a table of sizes."""
    is_v7 = "blocks.0.att.r_k" in weights
    if not is_v7 and "blocks.0.att.time_maa_w2" not in weights:
        raise UserError(
            f"{path} is neither RWKV-7 (blocks.0.att.r_k) nor RWKV-6 (blocks.0.att.time_maa_w2); "
            f"it has {', '.join(list(weights)[:3])} …"
        )
    in_blocks = [name for name in weights if re.match(r"blocks\.\d+\.", name)]
    n_layer = 1 + max(int(name.split(".")[1]) for name in in_blocks)
    heads = "blocks.0.att.r_k" if is_v7 else "blocks.0.att.time_faaaa"
    values = f"blocks.{min(1, n_layer - 1)}.att.v1"  # layer 0's may be missing
    places = {  # size: (tensor, axis, the tensor's number of dimensions)
        "vocab_size": ("emb.weight", 0, 2),
        "n_embd": ("emb.weight", 1, 2),
        "n_head": (heads, 0, 2),
        "head_size": (heads, 1, 2),
        "dim_ffn": ("blocks.0.ffn.key.weight", 0, 2),
    }
    if is_v7:
        places["decay_rank"] = ("blocks.0.att.w1", 1, 2)
        places["iclr_rank"] = ("blocks.0.att.a1", 1, 2)
        places["gate_rank"] = ("blocks.0.att.g1", 1, 2)
        if n_layer > 1 or values in weights:
            places["value_rank"] = (values, 1, 2)
    else:
        places["mix_rank"] = ("blocks.0.att.time_maa_w2", 1, 3)
        places["decay_rank"] = ("blocks.0.att.time_decay_w1", 1, 2)
    sizes = {}
    for size, (name, axis, n_dims) in places.items():
        w = weights.get(name)
        if w is None or w.dim() != n_dims:
            found = "missing" if w is None else list(w.shape)
            raise UserError(
                f"{path}: {name} is {found}, expected {n_dims} dimensions; "
                "is this a whole RWKV-6 or RWKV-7 file?"
            )
        sizes[size] = w.shape[axis]
    n_head = sizes.pop("n_head")
    if n_head * sizes["head_size"] != sizes["n_embd"]:
        raise UserError(
            f"{path}: {heads} is {n_head} heads of {sizes['head_size']}, "
            f"but the width is {sizes['n_embd']}"
        )
    return RWKVConfig("x070" if is_v7 else "x060", n_layer, **sizes)


def empty_network(config, with_score=False):
    """The network on the meta device: names and shapes, without memory for the numbers."""
    with torch.device("meta"):
        model = RWKV(config)
        if with_score:
            model.add_score()
    return model


def same_size(shape, other):
    """[C] and [1, 1, C] are one vector; [C, R] and [R, C] are not one matrix."""
    return [n for n in shape if n > 1] == [n for n in other if n > 1]


def tensor_problems(weights, expected):
    """A phrase for each tensor that is missing, of another size than in `expected`, or extra.

    expected: {name: shape}. Layer 0's v0, v1, v2, which are never used, may be missing.
    """
    problems = []
    for name, shape in expected.items():
        if name not in weights and name not in NEVER_TRAINED:
            problems.append(f"{name} is missing")
        elif name in weights and not same_size(weights[name].shape, shape):
            problems.append(f"{name} is {list(weights[name].shape)}, expected {list(shape)}")
    extra = [name for name in weights if name not in expected]
    return problems + [f"{name} {list(weights[name].shape)} is extra" for name in extra]


def from_pretrained(path, device="cpu", dtype=torch.float32, weights=None):
    """An official x060 or x070 file -> RWKV, a scalar head included.

    Tensors are converted one by one, so that the peak is about the model's own size. weights: of a
    file that has been read; converted in place. UserError names what does not fit.
    """
    weights = read_weights(path) if weights is None else weights
    config = config_of(weights, path)
    model = empty_network(config, with_score="score.weight" in weights)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    problems = tensor_problems(weights, shapes)
    if problems:
        more = " …" if len(problems) > 5 else ""
        raise UserError(
            f"{path}: read as {config.version} with {config.n_layer} layers of width "
            f"{config.n_embd}, but {len(problems)} tensors are missing, misshapen or extra: "
            f"{'; '.join(problems[:5])}{more}; is this a whole, unmodified model file?"
        )
    for name, shape in shapes.items():
        w = weights[name] if name in weights else torch.zeros(shape)  # zeros: of NEVER_TRAINED
        to_dtype = torch.float32 if name == "score.weight" else dtype
        weights[name] = w.to(device=device, dtype=to_dtype).reshape(shape)
    model.load_state_dict(weights, assign=True)
    return model


def save_pretrained(model, path, dtype=None):
    """Official names and shapes, `.pth` or `.safetensors`. dtype None: as they are.

    The scalar head keeps its float32.
    """
    weights = {}
    for name, p in base_weights(model):
        to_dtype = p.dtype if dtype is None or name == "score.weight" else dtype
        weights[name] = p.detach().to("cpu", to_dtype).contiguous()
    write_weights(weights, path)


def base_weights(model):
    """[(official name, parameter)] of every weight, without adapter and tuned state."""
    every = model.named_parameters()
    return [(n, p) for n, p in every if ".lora_" not in n and not n.startswith("tuned.")]


def fingerprint(model):
    """Hexadecimal digest of the weights as bfloat16.

    It is of the base, without adapter, tuned state and scalar head, and so it is the same whatever
    the file's format and the precision that it is loaded in.
    """
    digest = hashlib.blake2b(digest_size=16)
    with model.reference():  # extra parameters of an adapter as the base has them
        for name, p in sorted(base_weights(model)):
            if name not in NEVER_TRAINED and name != "score.weight":
                digest.update(f"{name} {list(p.shape)}".encode())
                bits = p.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16)
                digest.update(bits.numpy())
    return digest.hexdigest()


def base_of(path, about):
    """The file of the model that an adapter or a state belongs to.

    It is where `about`, what the file says of itself, has it, or of that name beside the file.
    """
    base = str(about.get("model", ""))
    place = Path(path).parent / base
    for candidate in (place, Path(path).parent / Path(base).name):
        if base and candidate.is_file():
            return str(candidate)
    if base:
        reason = f"{place}, which {path} was trained on, is not there"
    elif path:
        reason = f"nothing in or beside {path} says which one it was trained on"
    else:
        reason = "and --prompt, or --chat"
    raise UserError(f"which model? --model=FILE, a .pth or .safetensors; {reason}")


# ----------------------------------------------------------------------------------------------
# tuned states


def write_state(state, path, **about):
    """One sequence's state [L, 1, ...] as `path`, a .pth that other engines read.

    It holds blocks.{i}.att.time_state [H, N, N], rows = value. Shift vectors that are not zero and
    `about` go to a .json of the same name.
    """
    for key in ("att_shift", "ffn_shift"):
        if state[key].any():
            about[key] = state[key][:, 0].float().tolist()
    layers = state["wkv"][:, 0].float().cpu()  # [L, H, N, N]
    weights = {f"blocks.{i}.att.time_state": wkv.clone() for i, wkv in enumerate(layers)}
    with atomic_write(Path(path).with_suffix(".json")) as tmp:
        tmp.write_text(json.dumps(about) + "\n", encoding="utf-8")
    save_torch(weights, path)


def read_state(path, config=None):
    """A state file -> (state [L, 1, ...], what the .json beside it says or {}).

    With `config`, a UserError unless the state fits that network.
    """
    weights = read_weights(path)
    L, H, N = state_sizes(weights, path)
    if config is not None:
        found = f"{L} layers, {H} heads of {N}"
        n_head = config.n_embd // config.head_size
        expected = f"{config.n_layer} layers, {n_head} heads of {config.head_size}"
        if found != expected:
            raise UserError(f"{path} is a state of another model: {found}; this one has {expected}")
    about = read_json(Path(path).with_suffix(".json"))
    layers = [weights[f"blocks.{i}.att.time_state"].float() for i in range(L)]
    state = {"wkv": torch.stack(layers)[:, None]}
    for key in ("att_shift", "ffn_shift"):
        shift = about.pop(key, None)
        shift = torch.zeros(L, H * N) if shift is None else torch.tensor(shift)
        state[key] = shift[:, None]
    for key, value in state.items():
        n_wrong = int((~value.isfinite()).sum())
        if n_wrong:
            raise UserError(f"{path} has {n_wrong} values in {key} that are NaN or infinite")
    return state, about


def state_sizes(weights, path):
    """The tensors of a state file -> (layers, heads, size of a head); UserError if it is none."""
    names = {f"blocks.{i}.att.time_state" for i in range(len(weights))}
    shapes = {w.shape for w in weights.values()}
    if weights.keys() == names and len(shapes) == 1:
        shape = shapes.pop()
        if len(shape) == 3 and shape[1] == shape[2]:
            return len(weights), shape[0], shape[1]
    hint = ""
    if "emb.weight" in weights:
        hint = "; it looks like a whole model: give it as the model"
    raise UserError(
        f"{path} is not a tuned state: expected blocks.{{i}}.att.time_state [H, N, N] for each "
        f"layer and nothing else; it has {len(weights)} tensors, "
        f"{', '.join(list(weights)[:2])} …{hint}"
    )
