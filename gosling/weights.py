"""Weights in and out: `.pth` and `.safetensors` files, tuned states, and what they say."""

import errno
import hashlib
import json
import re
import zlib
from pathlib import Path

from gosling import hub, web_rwkv
from gosling.config import UserError
from gosling.files import (
    atomic_write,
    checked,
    first_line,
    load_torch,
    looks_like,
    read_json,
    save_torch,
)
from gosling.schemas import About, State
from gosling.shard import full
from model import NEVER_TRAINED, RWKV, RWKVConfig

import torch
import torch.nn as nn
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

# ----------------------------------------------------------------------------------------------
# files of tensors


def is_safetensors(path):
    return Path(path).suffix in (".safetensors", ".st")


def read_weights(path, in_place=False):
    """{official name: tensor} of a `.pth` or `.safetensors` file, or of what gosling/hub.py reads.

    That is a Hugging Face folder, all shards of one of them, fla's RWKV-7, RWKV-6 as it is there,
    and PEFT's adapters. A `.st` is web-rwkv's. in_place: numbers are read when they are used.
    """
    weights = {}
    for file in hub.files_of(path):
        weights |= read_tensors(file, in_place)
    if not weights:
        raise UserError(f"{path} holds no tensors")
    return hub.official(weights, path)


def read_tensors(file, in_place=False):
    """{name: tensor} of one file, a .st under official names and in our orientation."""
    if is_safetensors(file):
        try:
            weights = load_file(file)
        except UNREADABLE as e:
            reason = looks_like(file) if Path(file).is_file() else ""
            reason = reason or first_line(e)
            raise UserError(f"{file} cannot be read as safetensors: {reason}") from e
        check_tensors(weights, file)
        metadata = metadata_of(file)
        if metadata.pop("crc32", None) not in (None, checksum(weights, metadata)):
            raise UserError(
                f"{file} is damaged: it is not what was written (if you have changed it, take "
                "crc32 out of its metadata)"
            )
        return web_rwkv.from_web_rwkv(weights) if Path(file).suffix == ".st" else weights
    weights = load_torch(file, in_place=in_place)
    is_flat = isinstance(weights, dict)
    if not is_flat or not all(isinstance(w, torch.Tensor) for w in weights.values()):
        raise UserError(
            f"{file} is not a file of weights (a flat dict of tensors); "
            "last.pt is for resuming, rwkv-*.pth holds weights"
        )
    check_tensors(weights, file)
    return weights


def check_tensors(weights, file):
    """UserError for a name that no weights have, or a tensor whose numbers are not in the file."""
    for name, w in weights.items():
        if not isinstance(name, str) or len(name) > 200 or not name.isprintable():
            raise UserError(f"{file} has a tensor of the name {name!r:.60}, which no weights have")
        is_dense = w.layout == torch.strided and w.device.type == "cpu"
        if not is_dense or w.untyped_storage().nbytes() < w.nbytes:
            kind = f"{str(w.dtype)[6:]} {list(w.shape)}, {w.layout} on {w.device}"
            raise UserError(f"{file}: {name} ({kind}) does not have all its numbers in the file")


UNREADABLE = (SafetensorError, OSError, ValueError, KeyError)  # of the library, for such files


def metadata_of(file):
    """{str: str} that a .safetensors has beside its tensors."""
    try:
        with safe_open(file, "pt") as f:
            return f.metadata() or {}
    except UNREADABLE as e:
        raise UserError(f"{file} cannot be read as safetensors ({first_line(e)})") from e


def checksum(weights, metadata):
    """Of all that a .safetensors holds; other programs' files have none."""
    value = zlib.crc32(json.dumps(metadata, sort_keys=True).encode())
    for name, w in sorted(weights.items()):
        value = zlib.crc32(f"{name} {w.dtype} {list(w.shape)}".encode(), value)
        value = zlib.crc32(w.contiguous().flatten().view(torch.uint8).numpy(), value)
    return f"{value:08x}"


def read_metadata(path):
    """{str: str} that weights carry beside the tensors, of an adapter its alpha and rslora.

    A .safetensors carries it inside, PEFT's adapters in a file beside them.
    """
    about, file = {}, hub.files_of(path)[0]
    if is_safetensors(file):
        about = metadata_of(file)
    about.pop("crc32", None)  # of that file alone, see checksum
    checked(about, About, f"what {path} says of itself")
    return about if "alpha" in about else {**about, **hub.peft_settings(file)}


def write_weights(weights, path, metadata=None):
    """`.pth` or `.safetensors` by the path's ending, atomically.

    metadata {str: str} goes into a .safetensors alone. A `.st` is web-rwkv's.
    """
    if not is_safetensors(path):
        save_torch(weights, path)
        return
    if Path(path).suffix == ".st":
        weights = web_rwkv.to_web_rwkv(weights)
    metadata = metadata or {}
    with atomic_write(path) as tmp:
        try:
            save_file(weights, tmp, {**metadata, "crc32": checksum(weights, metadata)})
        except SafetensorError as e:
            raise OSError(errno.EIO, str(e)) from e


# ----------------------------------------------------------------------------------------------
# a whole network


FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def kind_of(weights):
    """What {name: tensor} is by its names: "LoRA", "tuned state", or else "weights"."""
    if any(name.endswith(".lora_A") for name in weights):
        return "LoRA"
    return "tuned state" if all(name.endswith(".time_state") for name in weights) else "weights"


def config_of(weights, path="the file"):
    """RWKVConfig from the tensors' names and shapes, never from a table of sizes."""
    is_v7 = "blocks.0.att.r_k" in weights
    if not is_v7 and "blocks.0.att.time_maa_w2" not in weights:
        kind, hint = kind_of(weights), ""
        if kind != "weights":
            hint = f"; it is a {kind}, which goes beside the model it was trained on"
        raise UserError(
            f"{path} is neither RWKV-7 (blocks.0.att.r_k) nor RWKV-6 (blocks.0.att.time_maa_w2); "
            f"it has {', '.join(list(weights)[:3])} …{hint}"
        )
    deep = [name for name in weights if re.search(r"\.s_emb|\.[kv]_emb|\.qkv\.", name)]
    if is_v7 and deep:
        kind = "7a" if all(".s_emb" in name for name in deep) else "7b"
        raise UserError(
            f"{path} is an RWKV-{kind}: DeepEmbed ({deep[0]}) is not supported; give a plain RWKV-7"
        )
    n_layer = count_layers(weights, path)
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


def count_layers(weights, path):
    """How many layers the names have; UserError if their numbers do not begin at 0, one by one."""
    found = {
        match[1] for match in (re.match(r"blocks\.(\d+)\.", name) for name in weights) if match
    }
    missing = [i for i in range(len(found)) if str(i) not in found]
    if missing:
        raise UserError(
            f"{path}: {len(found)} layers have tensors, but none is number {missing[0]}; "
            "is this a whole, unmodified model file?"
        )
    return len(found)


def empty_network(config, with_score=False):
    """The network on the meta device: names and shapes, without memory for the numbers."""
    with torch.device("meta"):
        model = RWKV(config)
        if with_score:
            model.add_score()
    return model


def expected_shapes(config, like=()):
    """{official name: shape} of every parameter.

    Those of a scalar head and of a tuned state, which a file may hold, if `like` has their names.
    """
    model = empty_network(config, "score.weight" in like)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    if any(name.endswith(".time_state") for name in like):
        shapes |= dict.fromkeys(state_names(config.n_layer), state_shape(config))
    return shapes


def state_names(n_layer):
    return [f"blocks.{i}.att.time_state" for i in range(n_layer)]


def state_shape(config):
    """[H, N, N] of a layer's state"""
    N = config.head_size
    return [config.n_embd // N, N, N]


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


def wrong_numbers(name, w):
    """What is wrong with a tensor's numbers, in words; "" if they are floating point and finite."""
    if w.dtype not in FLOATS:
        dtype = str(w.dtype)[6:]
        return f"{name} is {dtype}, expected float32, bfloat16 or float16, not quantised weights"
    if w.isfinite().all():
        return ""
    return f"{name} has {int((~w.isfinite()).sum()):,} values that are NaN or infinite"


def check_numbers(weights, path):
    """UserError that names the first tensor with numbers that cannot be computed with."""
    for name, w in weights.items():
        problem = wrong_numbers(name, w)
        if problem:
            raise UserError(f"{path}: {problem}; give a file of whole, finite weights")


def from_pretrained(path, device="cpu", dtype=torch.float32, weights=None):
    """A whole x060 or x070, any file or folder of read_weights -> RWKV, a scalar head included.

    A tuned state inside, as RWKV-6 files may have, is what sequences start from; it is frozen.
    Tensors are converted one by one, so that the peak is about the model's own size. dtype: None
    leaves them as they are, and where they are, in the file. weights: of a file that has been read;
    converted in place. UserError names what does not fit.
    """
    weights = read_weights(path, in_place=dtype is None) if weights is None else weights
    config = config_of(weights, path)
    problems = tensor_problems(weights, expected_shapes(config, weights))
    if problems:
        more = " …" if len(problems) > 5 else ""
        raise UserError(
            f"{path}: read as {config.version} with {config.n_layer} layers of width "
            f"{config.n_embd}, but {len(problems)} tensors are missing, misshapen or extra: "
            f"{'; '.join(problems[:5])}{more}; is this a whole, unmodified model file?"
        )
    check_numbers(weights, path)
    model = empty_network(config, with_score="score.weight" in weights)
    layers = [weights.pop(name) for name in state_names(config.n_layer) if name in weights]
    for name, p in model.named_parameters():
        w = weights[name] if name in weights else torch.zeros(p.shape)  # zeros: of NEVER_TRAINED
        to_dtype = torch.float32 if name == "score.weight" else dtype
        weights[name] = w.to(device=device, dtype=to_dtype or w.dtype).reshape(p.shape)
    model.load_state_dict(weights, assign=True)
    if layers:
        state = TunedState(config).to(device).requires_grad_(False)
        for p, w in zip(state.wkv, layers, strict=True):
            p.copy_(w)
        model.tuned.append(state)
    return model


def save_pretrained(model, path, dtype=None, main=True):
    """Official names and shapes, `.pth` or `.safetensors`. dtype None: as they are.

    The scalar head keeps its float32, and so does a state that the model's file had inside. Of a
    model in shares one tensor after the other is whole. main: False = only hand the shares over.
    """
    weights = {}
    for name, p in base_weights(model):
        w, to_dtype = full(p.detach()), p.dtype
        if dtype is not None and name != "score.weight":
            to_dtype = dtype
        if main:
            weights[name] = w.to("cpu", to_dtype).contiguous()
    if not main:
        return
    for inside in states_inside(model):
        layers = [wkv.detach().cpu().clone() for wkv in inside.wkv]
        weights |= dict(zip(state_names(len(layers)), layers, strict=True))
    write_weights(weights, path)


def states_inside(model):
    """[TunedState] that came with the model's file, [] of most; not one that trains."""
    return [state for state in model.tuned if not any(p.requires_grad for p in state.parameters())]


def base_weights(model):
    """[(official name, parameter)] of every weight, without adapter and tuned state."""
    every = model.named_parameters()
    return [(n, p) for n, p in every if ".lora_" not in n and not n.startswith("tuned.")]


def fingerprint(model):
    """Hexadecimal digest of the weights as bfloat16.

    It is of the base, without adapter, tuned state and scalar head, and so it is the same whatever
    the file's format and the precision that it is loaded in.
    """
    with model.reference():  # extra parameters of an adapter as the base has them
        return digest_of(dict(base_weights(model)))


def digest_of(weights):
    """The fingerprint of {official name: tensor of the network's shape}."""
    digest = hashlib.blake2b(digest_size=16)
    for name, w in sorted(weights.items()):
        if name not in NEVER_TRAINED and name != "score.weight":
            digest.update(f"{name} {list(w.shape)}".encode())
            bits = full(w.detach()).to("cpu", torch.bfloat16).contiguous().view(torch.int16)
            digest.update(bits.numpy())
    return digest.hexdigest()


def check_base(path, about, model, base, another_base=False):
    """UserError if `path`, an adapter's or a state's file, was trained on other weights.

    about: what that file says of itself; without a fingerprint it is taken as it is. model: the
    network, or its fingerprint; base: its file. another_base: other weights are meant.
    """
    expected = about.get("fingerprint")
    if another_base or not expected:
        return
    found = model if isinstance(model, str) else fingerprint(model)
    if found != expected:
        raise UserError(
            f"{path} was trained on {about.get('model')}, and {base} has other weights; give the "
            "model that it was trained on, or --another_base if this one is meant"
        )


def base_of(path, about):
    """The file of the model that an adapter or a state belongs to.

    It is where `about`, what the file says of itself, has it, or of that name beside the file.
    """
    base, folder = str(about.get("model", "")), hub.folder_of(path)
    place = folder / base
    for candidate in (place, folder / Path(base).name):
        if base and (candidate.is_file() or candidate.is_dir()):
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


class TunedState(nn.Module):
    """A learned state to start from in place of zero: wkv, for each layer [H, N, N].

    shift: train the inputs "before the first token" too, both [L, C]. layers: train the states of
    these alone; () = of all.
    """

    def __init__(self, c, shift=False, layers=()):
        super().__init__()
        L, H, N = c.n_layer, c.n_embd // c.head_size, c.head_size
        if not set(layers) <= set(range(L)):
            raise UserError(f"layers={layers}: expected numbers from 0 to {L - 1}")
        trained = [not layers or i in layers for i in range(L)]
        self.wkv = nn.ParameterList(nn.Parameter(torch.zeros(H, N, N), on) for on in trained)
        self.att_shift = nn.Parameter(torch.zeros(L, c.n_embd), shift)
        self.ffn_shift = nn.Parameter(torch.zeros(L, c.n_embd), shift)

    def forward(self):
        """-> {"wkv": [L, H, N, N], "att_shift", "ffn_shift": [L, C]}"""
        shifts = {"att_shift": self.att_shift, "ffn_shift": self.ffn_shift}
        return {"wkv": torch.stack(list(self.wkv)), **shifts}

    @torch.no_grad()
    def load(self, state):
        """Start from a state [L, 1, ...], as read_state and the network give it."""
        for p, wkv in zip(self.wkv, state["wkv"][:, 0], strict=True):
            p.copy_(wkv)
        self.att_shift.copy_(state["att_shift"][:, 0])
        self.ffn_shift.copy_(state["ffn_shift"][:, 0])


def write_state(state, path, **about):
    """One sequence's state [L, 1, ...] as `path`, a .pth that other engines read.

    It holds blocks.{i}.att.time_state [H, N, N], rows = value. Shift vectors that are not zero and
    `about` go to a .json of the same name.
    """
    for key in ("att_shift", "ffn_shift"):
        if state[key].any():
            about[key] = state[key][:, 0].float().tolist()
    layers = state["wkv"][:, 0].float().cpu()  # [L, H, N, N]
    weights = {
        name: wkv.clone() for name, wkv in zip(state_names(len(layers)), layers, strict=True)
    }
    with atomic_write(Path(path).with_suffix(".json")) as tmp:
        tmp.write_text(json.dumps(about) + "\n", encoding="utf-8")
    save_torch(weights, path)


def read_state(path, config=None):
    """A state file -> (state [L, 1, ...], what it says of itself or {}).

    A .st is web-rwkv's orientation and is turned. With `config`, a UserError unless the state fits
    that network.
    """
    weights = read_weights(path)
    L, H, N = state_sizes(weights, path)
    if config is not None:
        found = f"{L} layers, {H} heads of {N}"
        n_head = config.n_embd // config.head_size
        expected = f"{config.n_layer} layers, {n_head} heads of {config.head_size}"
        if found != expected:
            raise UserError(f"{path} is a state of another model: {found}; this one has {expected}")
    about = state_description(path)
    for key in ("att_shift", "ffn_shift"):
        check_shift(about.get(key), (L, H * N), f"{path}: {key}")
    layers = [weights[name].float() for name in state_names(L)]
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


def state_description(path):
    """What a state's file says of itself, in a .json beside it or inside a .st; {} if nothing."""
    return read_json(Path(path).with_suffix(".json"), State) or checked(
        read_metadata(path), State, path
    )


def check_shift(rows, shape, where):
    """UserError unless it is None or a list of lists of these sizes."""
    n_layer, width = shape
    if rows is None or (len(rows) == n_layer and all(len(row) == width for row in rows)):
        return
    found = [len(row) for row in rows[:3]]
    raise UserError(
        f"{where} has {len(rows)} rows of {found} … numbers; the state has {n_layer} layers of "
        f"width {width}; put the .json back that was written with it"
    )


def state_sizes(weights, path):
    """The tensors of a state file -> (layers, heads, size of a head); UserError if it is none."""
    shapes = {w.shape for w in weights.values()}
    is_state = weights.keys() == set(state_names(len(weights))) and len(shapes) == 1
    if is_state and all(w.dtype in FLOATS for w in weights.values()):
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
