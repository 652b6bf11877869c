"""What trains: every weight, an adapter (LoRA), the initial state, or a scalar head; and its files.

LoRA (arXiv 2106.09685)    y = W x + scale B A x        A [r, in] random, B [out, r] zero
"""

import contextlib
import dataclasses
import math
import re
from pathlib import Path

from gosling.config import UserError, print0
from gosling.files import seen_from
from gosling.runs import check_weights, prune
from gosling.shard import fill, full, local, place, shards
from gosling.weights import (
    TunedState,
    base_of,
    base_weights,
    check_base,
    check_numbers,
    from_pretrained,
    read_metadata,
    read_state,
    read_weights,
    save_pretrained,
    state_description,
    states_inside,
    write_state,
    write_weights,
)
from gosling.weights import fingerprint as fingerprint_of
from model import NEVER_TRAINED, Linear
from wkv_cuda import fused
from wkv_cuda.casts import cast

import torch
import torch.nn as nn
import torch.nn.functional as F


class LoRALinear(Linear):
    """A Linear with an adapter beside its weight, which it shares: y = W x + scale B A x."""

    def __init__(self, linear, r, scale, dropout):
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features)
        self.train(linear.training)
        self.weight = linear.weight  # [out, in]
        A = fused.as_float32(self.weight.new_empty(r, self.in_features))
        self.lora_A = nn.Parameter(nn.init.kaiming_uniform_(A, a=math.sqrt(5)))
        # With B at zero the network is unchanged until B has moved.
        self.lora_B = nn.Parameter(A.new_zeros(self.out_features, r))
        self.lora_scale, self.lora_dropout, self.enabled = scale, dropout, True

    def whole_weight(self):
        """W + scale B A [out, in], without dropout: the head's loss reads its weight at once."""
        if not self.enabled:
            return self.weight
        return self.weight + self.lora_scale * (self.lora_B @ self.lora_A).to(self.weight.dtype)

    def forward(self, x):
        """x [..., in] -> [..., out]"""
        y = super().forward(x)
        if not self.enabled:
            return y
        h = fused.linear(F.dropout(x, self.lora_dropout, self.training), cast(self.lora_A, x.dtype))
        return torch.add(y, fused.linear(h, cast(self.lora_B, x.dtype)), alpha=self.lora_scale)


def task_states(model, tasks):
    """The state that each sequence starts from, by its task: tasks [D] -> state [L, D, ...]."""
    values = [tuned() for tuned in model.tuned]
    stacked = {key: torch.stack([value[key] for value in values], 1) for key in values[0]}
    return {key: value.index_select(1, tasks) for key, value in stacked.items()}


# ----------------------------------------------------------------------------------------------
# choosing what trains


def set_tune(model, tune, tasks=1, cast=True, **options):
    """What trains, in float32; everything else gets requires_grad = False and keeps its dtype.

    tune: "full" = every weight; "lora" = adapters, options as in add_adapters; "state" = the states
    that sequences start from, `tasks` of them, options as in TunedState; "head" = the scalar head
    alone. A scalar head (add_score) trains with any of them, in place of the language model's. An
    adapter or a state that was there goes; a state inside the model's file stays as it is, or is
    what a tuned one starts from. cast: False leaves it to shard.place to make weights float32.
    """
    if tune not in ("full", "lora", "state", "head") or (tune == "head" and model.score is None):
        raise UserError(f"tune={tune!r}: expected full, lora or state, or for a reward model head")
    remove_adapters(model)
    inside = states_inside(model)
    model.tune, model.tuned, model.extra_base = tune, nn.ModuleList(inside), {}
    model.requires_grad_(False)
    if tune == "full":
        for name, p in base_weights(model):
            p.requires_grad = name not in frozen_names(model)
            p.data = fused.as_float32(p.data) if cast else p.data
    elif tune == "lora":
        add_adapters(model, **options)
    elif tune == "state":
        like = fused.as_float32(model.emb.weight[:0])
        states = [TunedState(model.config, **options) for _ in range(tasks)]
        for state in states if inside else ():
            state.load({key: value[:, None] for key, value in inside[0]().items()})
        model.tuned = nn.ModuleList(state.to(like.device, like.dtype) for state in states)
    if model.score is not None:
        model.score.requires_grad_(True)


def frozen_names(model):
    """What no gradient reaches, and the scalar head, which is no part of the language model."""
    return NEVER_TRAINED if model.score is None else (*NEVER_TRAINED, "score.weight", "head.weight")


def remove_adapters(model):
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            with torch.device("meta"):
                linear = Linear(module.in_features, module.out_features)
            linear.train(module.training).weight = module.weight
            put(model, name, linear)


def add_adapters(model, r=32, alpha=64.0, dropout=0.0, rslora=False, targets=(), extra=()):
    """A LoRALinear in place of each matrix that `targets` name, and further parameters to train.

    r: rank; the update is scaled by alpha / r, or alpha / sqrt(r) with rslora (arXiv 2312.03732).
    targets: "key" for all of that name or "att.key" for one kind; none = all of att and ffn. extra:
    parts of the names of further parameters ("ln", "x_"); they are saved with the adapter.
    """
    if r < 1:
        raise UserError(f"lora_r={r}: expected a number above 0")
    scale = alpha / (math.sqrt(r) if rslora else r)
    # Sorted, because A is random and a set's own order differs from process to process.
    for name in sorted(matrices_of(model, targets or ("att", "ffn"))):
        put(model, name, LoRALinear(model.get_submodule(name), r, scale, dropout))
    for name in extras_of(model, extra):
        p = model.get_parameter(name)
        p.data, p.requires_grad = fused.as_float32(p.data), True
        model.extra_base[name] = p.detach().clone()
    model.lora = dict(r=r, alpha=alpha, rslora=rslora, dropout=dropout)


def matrices_of(model, targets):
    """{names of the Linear layers that these LoRA targets stand for}"""
    kinds = {}  # of each layer: att.key of blocks.3.att.key
    for name, module in model.named_modules():
        if isinstance(module, Linear) and f"{name}.weight" not in frozen_names(model):
            kinds[name] = re.sub(r"blocks\.\d+\.", "", name)
    chosen = set()
    for target in targets:
        found = [n for n, kind in kinds.items() if target in (n, kind, *kind.split("."))]
        if not found:
            raise UserError(
                f"LoRA target {target!r} is not a matrix of {model.config.version}; there are "
                f"{', '.join(sorted(set(kinds.values())))}"
            )
        chosen.update(found)
    return chosen


def extras_of(model, parts):
    """[names of the parameters that have one of `parts` in them]"""
    names = [name for name, _ in base_weights(model) if name not in frozen_names(model)]
    for part in parts:
        if not any(part in name for name in names):
            raise UserError(f"extra={part!r}: no parameter has that in its name")
    return [name for name in names if any(part in name for part in parts)]


def put(model, name, value):
    """A module or a parameter in place of the one of that dotted name."""
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, value)


@contextlib.contextmanager
def reference(model):
    """The same network without adapter and tuned state, extra trained parameters as they were.

    It is the reference of DPO and GRPO. A state inside the model's file stays on.
    """
    adapters = [m for m in model.modules() if isinstance(m, LoRALinear) and m.enabled]
    tuned, base = model.tuned, getattr(model, "extra_base", {})
    for adapter in adapters:
        adapter.enabled = False
    model.tuned = nn.ModuleList(states_inside(model))
    trained = {name: local(model.get_parameter(name).detach()).clone() for name in base}
    for name, value in base.items():
        fill(model.get_parameter(name).data, value)
    keeps, model.keep_casts = model.keep_casts, False  # they do not see what `.data` is given
    try:
        yield model
    finally:
        model.keep_casts = keeps
        for adapter in adapters:
            adapter.enabled = True
        model.tuned = tuned
        for name, value in trained.items():
            local(model.get_parameter(name).data).copy_(value)


def load_to_tune(cfg, run, score=False):
    """The model of a training script, on the device: cfg.init_from, trainable as cfg.tune says.

    cfg.adapter, a LoRA or a tuned state, is loaded, with the rank, scale and targets that its file
    says: cfg.lora_r, lora_alpha and lora_rslora become those. Trained weights are float32, frozen
    ones in the run's dtype. score: with a scalar head, a new one if the file has none.
    """
    if not cfg.init_from:
        raise UserError("which model? --init_from=FILE, the .pth or .safetensors to start from")
    if cfg.adapter and cfg.tune not in ("lora", "state"):
        raise UserError(
            f"adapter is for --tune=lora or state, not {cfg.tune}; merge it first (export.py merge)"
        )
    dtype = torch.float32 if cfg.tune == "full" else run.dtype
    in_shares = shards(cfg, run)  # read block by block, so that no process ever has all in memory
    model = from_pretrained(cfg.init_from, dtype=None if in_shares else dtype)
    if not score:
        model.score = None
    elif model.score is None:
        model.add_score()
    if cfg.adapter:
        about = read_metadata(cfg.adapter) if cfg.tune == "lora" else read_state(cfg.adapter)[1]
        check_base(cfg.adapter, about, model, cfg.init_from, cfg.another_base)
    options = lora_flags(cfg, model) if cfg.tune == "lora" else {}
    torch.manual_seed(cfg.seed)
    set_tune(model, cfg.tune, cast=not in_shares, **options)
    if cfg.adapter:
        load_tuned(model, cfg.adapter)
    model.compute_dtype, model.grad_cp = run.dtype, cfg.grad_cp
    place(model, cfg, run)
    fused.build(run.device)
    return model


def lora_flags(cfg, model):
    """The options of set_tune that the flags lora_… give.

    With cfg.adapter its file decides; a flag that is not at its default and says otherwise is a
    UserError that names both.
    """
    defaults = {
        field.name.removeprefix("lora_"): field.default
        for field in dataclasses.fields(cfg)
        if field.name.startswith("lora_")
    }
    options = {key: getattr(cfg, f"lora_{key}") for key in defaults}
    if not cfg.adapter:
        return options
    in_file = lora_options(cfg.adapter)
    if "alpha" not in in_file:
        print0(
            f"{cfg.adapter} does not say its alpha; lora_alpha={cfg.lora_alpha:g} is taken, its "
            f"rslora as lora_rslora={cfg.lora_rslora}"
        )
    for key, value in in_file.items():
        said, meant = options[key], value
        if key == "targets":
            said, meant = matrices_of(model, said), set(value)
        elif key == "extra":
            said, meant = set(extras_of(model, said)), set(value)
        if options[key] != defaults[key] and said != meant:
            shown = value
            if isinstance(value, list):
                shown = ", ".join(sorted(value)[:4]) or "none"
            raise UserError(
                f"{cfg.adapter} is of other settings: it was trained with lora_{key}={shown}, and "
                f"--lora_{key}={options[key]} is given; leave the flag out"
            )
        options[key] = value
    cfg.lora_r, cfg.lora_alpha = options["r"], float(options["alpha"])
    cfg.lora_rslora = options["rslora"]
    return options


# ----------------------------------------------------------------------------------------------
# files of what trains


def save_tuned(model, cfg, run, name, about=None):
    """Rank 0 writes what trains into cfg.out_dir, see write_tuned; the oldest numbered ones go."""
    check_weights(cfg, model)
    path = write_tuned(model, cfg.out_dir, name, run.dtype, about, run.main)
    if run.main:
        prune(path, cfg.keep_last)


def save_best(model, cfg, run, value, best, about=None):
    """best.* if `value`, of which lower is better, is below `best` -> the best value so far.

    A value of None is no value.
    """
    if value is None or not value < best:
        return best
    save_tuned(model, cfg, run, "best", about)
    return value


def load_best(model, cfg):
    """What trains, as best.* has it."""
    load_tuned(model, tuned_path(model, cfg.out_dir, "best"))


def tuned_path(model, folder, name):
    """folder/rwkv-<name>.pth, lora-<name>.safetensors or state-<name>.pth; best.* for "best"."""
    kind = model.tune if model.tune in ("lora", "state") else "rwkv"
    stem = "best" if name == "best" else f"{kind}-{name}"
    return Path(folder) / (stem + (".safetensors" if kind == "lora" else ".pth"))


def write_tuned(model, folder, name, dtype=None, about=None, main=True):
    """What trains, as tuned_path says -> the path. dtype: of whole weights; None = as they are.

    about: what an adapter's or a state's file says of itself, see `origin`. A LoRA has RWKV-PEFT's
    keys, ....lora_A [r, in] and ....lora_B [out, r]; extra parameters have their own names. main:
    False = only hand this process's share over.
    """
    path, about = tuned_path(model, folder, name), about or {}
    if model.tune == "lora":
        trained = {n: full(p.detach()) for n, p in model.named_parameters() if p.requires_grad}
        metadata = {key: str(value) for key, value in {**model.lora, **about}.items()}
        if main:
            write_weights({n: w.cpu().contiguous() for n, w in trained.items()}, path, metadata)
    elif model.tune != "state":
        save_pretrained(model, path, dtype, main)
    elif main:
        save_state(model, path, **about)
    return path


@torch.no_grad()
def save_state(model, path, task=0, /, **about):
    """One tuned state as write_state writes it; a scalar head's weight goes to the .json, too."""
    if model.score is not None:
        about["score"] = model.score.weight[0].tolist()
    state = {key: value[:, None] for key, value in model.tuned[task]().items()}  # [L, 1, ...]
    write_state(state, path, **about)


@torch.no_grad()
def load_tuned(model, path):
    """Values for what trains, from a file of write_tuned; every name and size must fit."""
    if model.tune == "state":
        state, about = read_state(path, model.config)
        model.tuned[0].load(state)
        if model.score is not None and about.get("score"):
            score, n_embd = about["score"], model.config.n_embd
            if len(score) != n_embd:
                raise UserError(f"{path}: score has {len(score)} numbers, the model's is {n_embd}")
            model.score.weight[0] = torch.tensor(score)
        return
    saved = read_weights(path)
    check_numbers(saved, path)
    if model.tune == "lora":
        check_scale(model, path)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    names = saved.keys() | trained.keys() if model.tune == "lora" else trained.keys()
    for name in sorted(names):
        in_file, in_model = shape_of(saved.get(name)), shape_of(trained.get(name))
        if in_file != in_model:
            raise UserError(
                f"{path} is of another base or other settings: {name} is {in_file} in the file, "
                f"{in_model} in the model; check --lora_r, --lora_targets and --init_from"
            )
        fill(trained[name], saved[name])


def check_scale(model, path):
    """UserError if a LoRA's file says another alpha or rslora than the model has."""
    about = read_metadata(path)
    if "alpha" not in about:
        return
    in_file = (float(about["alpha"]), about.get("rslora") == "True")
    in_model = (float(model.lora["alpha"]), model.lora["rslora"])
    if in_file != in_model:
        raise UserError(
            f"{path} was trained with alpha {in_file[0]:g}, rslora {in_file[1]}; the model has "
            f"alpha {in_model[0]:g}, rslora {in_model[1]}"
        )


def shape_of(w):
    return "absent" if w is None else list(w.shape)


def origin(cfg, model, tokenizer, folder=None, fingerprint=None):
    """What the file of an adapter or a state says of itself: base, its fingerprint, tokenizer.

    Paths are as seen from `folder`, by default cfg.out_dir. What else the file that training goes
    on from says of itself is kept. {} for whole weights.
    """
    if getattr(cfg, "tune", "state") in ("full", "head"):
        return {}
    folder = folder or cfg.out_dir
    before, kept = getattr(cfg, "adapter", "") or getattr(cfg, "init_state", ""), {}
    if before:
        kept = state_description(before) if model.tune == "state" else read_metadata(before)
    ours = {"score", *(model.lora if model.tune == "lora" else ())}  # as the model has them now
    name = tokenizer.name
    if tokenizer.text:
        name = seen_from(Path(cfg.out_dir) / tokenizer.file_name, folder)
    return {
        **{key: value for key, value in kept.items() if key not in ours},
        "model": seen_from(cfg.init_from, folder),
        "fingerprint": fingerprint or fingerprint_of(model),
        "tokenizer": name,
    }


def load_model(path, device="cpu", dtype=torch.float32, another_base=False):
    """A network by any of its files -> (model, what the file says of itself).

    The file is whole weights, or a LoRA or a tuned state, which name their base and are put on.
    UserError if that base has other weights now, unless another_base says that they are meant.
    """
    weights = read_weights(path)
    is_lora = any(name.endswith(".lora_A") for name in weights)
    if not is_lora and not all(name.endswith(".time_state") for name in weights):
        return from_pretrained(path, device, dtype, weights), {}
    if is_lora:
        about = read_metadata(path)
        if "model" not in about:
            raise UserError(
                f"{path} does not say which model it was trained on; merge it with export.py merge "
                f"--model=… --adapter={path}, and give that file"
            )
    else:
        state, about = read_state(path)
    base = base_of(path, about)
    try:
        model = from_pretrained(base, device, dtype)
    except UserError as e:
        raise UserError(f"{path} was trained on {base}: {e}") from e
    check_base(path, about, model, base, another_base)
    if "score.weight" in weights or about.pop("score", None):
        model.add_score()
    if is_lora:
        options = lora_options(path, weights)
        if "alpha" not in options:
            raise UserError(
                f"{path} does not say its alpha; merge it with export.py merge --alpha=…, "
                "and give that file"
            )
        set_tune(model, "lora", **options)
    else:
        shift = bool(state["att_shift"].any() or state["ffn_shift"].any())
        set_tune(model, "state", shift=shift)
    load_tuned(model, path)
    return model.to(device), about


def lora_options(path, weights=None):
    """The options of set_tune that a LoRA file was trained with, from its tensors and metadata.

    Without alpha and rslora where nothing says them. weights: of a file that has been read.
    """
    weights, about = read_weights(path) if weights is None else weights, read_metadata(path)
    targets = [name.removesuffix(".lora_A") for name in weights if name.endswith(".lora_A")]
    if not targets:
        raise UserError(
            f"{path} is not a LoRA, it has no lora_A but {', '.join(list(weights)[:2])} …"
        )
    options = {
        "r": len(weights[f"{targets[0]}.lora_A"]),
        "targets": targets,
        "extra": [name for name in weights if ".lora_" not in name and name != "score.weight"],
    }
    if "alpha" in about:
        options |= {"alpha": float(about["alpha"]), "rslora": about.get("rslora") == "True"}
    return options
