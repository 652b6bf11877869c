"""Weights for elsewhere: merge, convert, a Hugging Face folder, states for other engines, a look.

    python export.py merge --model=base.pth --adapter=lora.safetensors --out=merged.pth
    python export.py merge --model=base.pth --state=state.pth --out=merged.pth      for RWKV-6
    python export.py convert --model=a.pth --out=b.safetensors --dtype=bfloat16     or bit for bit
    python export.py convert --model=a.pth --out=a.st --to=web-rwkv                 for Ai00
    python export.py convert --model=lora.safetensors --out=folder --to=peft        an adapter
    python export.py hub --model=a.pth --out=folder            for transformers, fla, rwkv7-hf
    python export.py hub --model=folder --out=a.pth            and back
    python export.py hub --model=a.pth --out=folder --to=rwkvtune       and rwkvserve
    python export.py gguf --model=a.pth --out=a.gguf --dtype=float16          for llama.cpp
    python export.py onnx --model=a.pth --out=a.onnx           for onnxruntime
    python export.py state --state=a.pth --out=a.st --to=web-rwkv                   or transformers
    python export.py inspect a.pth                             what it is, and what is odd

Each command has its own --help. Nothing is overwritten without --overwrite, or ever half written.

A hub folder of an RWKV-7 has flash-linear-attention's names and a model for transformers beside
them: AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True). That of an RWKV-6 is for
llama.cpp's converter. It is written as one model.safetensors; such folders, their shards and PEFT's
adapters are read by every command that takes a model or a LoRA. Layer 0's v0/v1/v2, which are never
used and which fla does not have, are left out, and are zeros on the way back. A tokenizer.json goes
along as it is. Of any other tokenizer there is a vocab.txt, which prepare.load_tokenizer(folder)
reads, and a tokenizer.json made of it for AutoTokenizer.

gguf wants the package gguf, and takes a LoRA as merge does: --adapter=lora.safetensors. onnx wants
the packages onnx and onnxscript.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from gosling.config import UserError, read_flags, warn
from gosling.files import seen_from, write_json
from gosling.gguf import gguf_package, write_gguf
from gosling.hub import cache_tensors, folder_of, to_peft
from gosling.hub_folder import (
    check_for_rwkvtune,
    hub_settings,
    hub_tensors,
    ranks_of_six,
    remove_older,
    rwkvtune_settings,
    write_model,
    write_rwkvtune_vocab,
    write_tokenizer,
)
from gosling.merge import check_origin, merge_lora, merge_state
from gosling.onnx_file import check_onnx, onnx_package, write_onnx
from gosling.tokenizer import tokenizer_of
from gosling.tune import shape_of
from gosling.weights import (
    FLOATS,
    check_numbers,
    config_of,
    expected_shapes,
    from_pretrained,
    kind_of,
    read_metadata,
    read_state,
    read_weights,
    state_names,
    tensor_problems,
    write_state,
    write_weights,
    wrong_numbers,
)

import torch
import tyro
from pydantic import NonNegativeInt, PositiveFloat

# ----------------------------------------------------------------------------------------------
# reading, checking, writing

WEIGHTS = (".pth", ".safetensors")


@dataclass
class Config:
    model: str  # to read: .pth, .safetensors, a Hugging Face folder or one of its shards
    out: str  # the file to write, .pth or .safetensors; hub: a folder, or on the way back a file
    dtype: Literal["", "float32", "bfloat16", "float16"] = ""  # to write; empty = as it is
    overwrite: bool = False  # replace --out if it is there


def check_out(cfg, suffixes):
    """UserError unless --out has one of `suffixes`, or with () is a folder, and may be written."""
    suffix = Path(cfg.out).suffix
    if suffixes and suffix not in suffixes:
        raise UserError(f"--out={cfg.out}: expected a name in {' or '.join(suffixes)}")
    if not suffixes and suffix in WEIGHTS:
        raise UserError(f"--out={cfg.out}: expected a folder")
    if Path(cfg.out).exists() and not cfg.overwrite:
        raise UserError(f"{cfg.out} is already there; choose another --out, or give --overwrite")


def cast(weights, dtype):
    """Every tensor of floats in `dtype` ("": as it is), in place; none may be NaN or infinite."""
    for name in list(weights):
        if weights[name].dtype not in FLOATS:
            raise UserError(wrong_numbers(name, weights[name]))
        if dtype:
            weights[name] = weights[name].to(getattr(torch, dtype))
        if not weights[name].isfinite().all():
            raise UserError(
                f"{name} would be NaN or infinite as {weights[name].dtype}, which cannot hold it"
            )


def write(weights, out, metadata=None):
    """To .pth or .safetensors; `weights` is emptied, so that memory holds one model, not two.

    Each tensor is written as a copy, since safetensors refuses views, and torch.save writes all
    that lies behind one.
    """
    copies = {}
    for name in list(weights):
        copies[name] = weights.pop(name).clone(memory_format=torch.contiguous_format)
    write_weights(copies, out, metadata)
    print(f"{out}: {total(copies)}")


def total(weights):
    """'1,234 parameters, float32, 0.01 MB'"""
    dtypes = ", ".join(sorted({str(w.dtype)[6:] for w in weights.values()}))
    n_parameters = sum(w.numel() for w in weights.values())
    megabytes = sum(w.nbytes for w in weights.values()) / 1e6
    return f"{n_parameters:,} parameters, {dtypes}, {megabytes:,.2f} MB"


# ----------------------------------------------------------------------------------------------
# merge, convert


@dataclass
class LoraConfig(Config):
    adapter: str = ""  # a LoRA, gosling's or RWKV-PEFT's; its extra tensors replace the base's
    alpha: PositiveFloat | None = None  # LoRA: it trained with; none = as its .safetensors says
    rslora: bool = False  # LoRA: its scale is alpha / sqrt(r); a .safetensors says it
    another_base: bool = False  # --model is not what it was trained on, and that is meant


@dataclass
class MergeConfig(LoraConfig):
    state: str = ""  # a tuned state, .pth; goes into the file as it is, for engines of RWKV-6


def merge(cfg):
    check_out(cfg, WEIGHTS)
    if not cfg.adapter and not cfg.state:
        raise UserError("nothing to merge: give --adapter=LORA or --state=STATE")
    weights = read_weights(cfg.model)
    config = config_of(weights, cfg.model)
    check_numbers(weights, cfg.model)
    check_origin(weights, config, cfg, cfg.state)
    if cfg.adapter:
        merge_lora(weights, cfg)
    cast(weights, cfg.dtype)
    if cfg.state:
        merge_state(weights, config, cfg)
    write(weights, cfg.out)


@dataclass
class ConvertConfig(Config):
    # a LoRA to a folder of PEFT, peft-hub: on a hub folder's model; a model to web-rwkv's .st
    to: Literal["", "peft", "peft-hub", "web-rwkv"] = ""


def convert(cfg):
    """As it is, or in `dtype`; .st: a whole model in web-rwkv's names and float16."""
    suffixes = {"": WEIGHTS, "peft": (), "peft-hub": (), "web-rwkv": (".st",)}
    check_out(cfg, suffixes[cfg.to])
    weights, metadata = read_weights(cfg.model), read_metadata(cfg.model)
    if cfg.to == "web-rwkv":
        check_for_web_rwkv(weights, cfg)
        cfg.dtype = "float16"
    if cfg.dtype:
        check_numbers(weights, cfg.model)
        cast(weights, cfg.dtype)
    if "alpha" in metadata and Path(cfg.out).suffix == ".pth":
        warn(
            f"a .pth cannot carry this LoRA's alpha={metadata['alpha']}, "
            f"rslora={metadata.get('rslora')}; write them down, merging it will ask"
        )
    if cfg.to.startswith("peft"):
        write_peft(weights, metadata, cfg)
    else:
        write(weights, cfg.out, metadata or None)


def check_for_web_rwkv(weights, cfg):
    """UserError for what web-rwkv's loader does not read."""
    if cfg.dtype not in ("", "float16"):
        raise UserError(f"--dtype={cfg.dtype}: web-rwkv reads float16 alone; leave the flag out")
    config = config_of(weights, cfg.model)
    problems = tensor_problems(weights, expected_shapes(config, weights))
    if problems:
        raise UserError(f"{cfg.model}: {problems[0]}; --to=web-rwkv is for a whole model")
    if "score.weight" in weights:
        raise UserError(f"{cfg.model} is a reward model; web-rwkv has no score.weight")
    if config.version == "x070" and config.n_layer == 1:
        raise UserError(
            f"{cfg.model} has one layer; web-rwkv reads sizes of RWKV-7 from the second"
        )


def write_peft(weights, metadata, cfg):
    """A folder as PEFT writes it; paths in the metadata become paths as seen from it."""
    for key in ("model", "tokenizer"):
        place = folder_of(cfg.model) / metadata.get(key, "")
        if key in metadata and place.suffix and place.exists():
            metadata[key] = seen_from(place, cfg.out)
    theirs, config = to_peft(weights, metadata, cfg.model, cfg.to == "peft-hub")
    weights.clear()
    write(theirs, Path(cfg.out) / "adapter_model.safetensors", metadata)
    write_json(Path(cfg.out) / "adapter_config.json", config)


# ----------------------------------------------------------------------------------------------
# tuned states


@dataclass
class StateConfig:
    state: str  # the file to read
    out: str  # the file to write: .pth, for web-rwkv .st, for transformers .safetensors
    # what it is; empty = by its ending: a .st is web-rwkv's
    from_: Annotated[Literal["", "rwkv", "web-rwkv"], tyro.conf.arg(name="from")] = ""
    # rwkv: gosling, RWKV-PEFT, RWKV-Runner, rwkv package; transformers: the caches of fla, rwkv7-hf
    to: Literal["rwkv", "web-rwkv", "transformers"] = "rwkv"
    overwrite: bool = False  # replace --out if it is there


def state(cfg):
    """rwkv: blocks.{i}.att.time_state [H, value, key], .pth. web-rwkv: the same names, [H, key,
    value] in float16, .st. transformers: layers.{i}.recurrent_state [1, H, key, value] and two
    shift vectors [1, C], .safetensors.

    The rwkv package's own state is [value, key] in RWKV-7 and [key, value] in RWKV-6: code that
    hands a file's tensors to an RWKV-6 there transposes them.
    """
    suffixes = {"rwkv": (".pth",), "web-rwkv": (".st",), "transformers": (".safetensors",)}
    check_out(cfg, suffixes[cfg.to])
    value, about = read_state(cfg.state)
    by_ending = "web-rwkv" if Path(cfg.state).suffix == ".st" else "rwkv"
    if cfg.from_ not in ("", by_ending):
        value["wkv"] = value["wkv"].mT
    if cfg.to == "rwkv":
        write_state(value, cfg.out, **about)
    elif cfg.to == "transformers":
        texts = {key: text for key, text in about.items() if isinstance(text, str)}
        write_weights(cache_tensors(value), cfg.out, texts or None)
    else:
        if value["att_shift"].any() or value["ffn_shift"].any():
            warn("web-rwkv does not read shift vectors; they are left out")
        layers = value["wkv"][:, 0]  # [L, H, value, key]; writing a .st turns them
        weights = dict(zip(state_names(len(layers)), layers, strict=True))
        cast(weights, "float16")
        texts = {key: text for key, text in about.items() if isinstance(text, str)}
        write_weights(weights, cfg.out, texts or None)
    L, _, H, N, _ = value["wkv"].shape
    print(f"{cfg.out}: a state of {L} layers, {H} heads of {N}, for {cfg.to}")


# ----------------------------------------------------------------------------------------------
# hub: folders


@dataclass
class HubConfig(Config):
    tokenizer: str = ""  # name or file; empty = as the model's folder says, or World if V is 65536
    # rwkvtune: its folder and rwkvserve's; empty: transformers, fla, rwkv7-hf, llama.cpp
    to: Literal["", "rwkvtune"] = ""


def hub(cfg):
    back = Path(cfg.model).is_dir() and not cfg.to
    check_out(cfg, WEIGHTS if back else ())
    weights = read_weights(cfg.model)
    check_kind(weights, cfg.model, "a hub folder")
    config = config_of(weights, cfg.model)
    if config.version == "x070" and config.head_size != 64:  # see FIXED of gosling/hub.py
        raise UserError(
            f"{cfg.model} is RWKV-7 with heads of {config.head_size}; hub is for heads of 64"
        )
    weights = whole_network(weights, config, cfg.model)
    cast(weights, cfg.dtype)
    if back:
        write(weights, cfg.out)
    else:
        write_folder(weights, config, cfg)


def check_kind(weights, path, where):
    """UserError for what is no model: `where`, the form to write, has no place for it."""
    kind = kind_of(weights)
    if kind == "LoRA":
        raise UserError(
            f"{path} is a LoRA; merge first: python export.py merge --model=BASE "
            f"--adapter={path} --out=merged.pth"
        )
    if any(name.endswith(".time_state") for name in weights):
        what = "is a tuned state" if kind == "tuned state" else "has a tuned state inside"
        raise UserError(
            f"{path} {what}, for which {where} has no place; give the model that the state was "
            "tuned on, and the state to an engine that reads states: export.py state"
        )
    if "score.weight" in weights:
        raise UserError(f"{path} is a reward model; {where} has no place for its score.weight")


def whole_network(weights, config, path):
    """{official name: tensor of the network's shape} of a whole model and nothing else; layer 0's
    v0/v1/v2 if the file has them."""
    shapes = expected_shapes(config)
    problems = tensor_problems(weights, shapes)
    if problems:
        raise UserError(f"{path}: {problems[0]}; expected a whole RWKV and nothing else")
    check_numbers(weights, path)
    return {name: weights[name].reshape(shapes[name]) for name in shapes if name in weights}


def write_folder(weights, config, cfg):
    """A hub folder of {official name: tensor}, which is emptied, and of the model's tokenizer."""
    tokenizer, folder = tokenizer_of(cfg.model, config.vocab_size, cfg.tokenizer), Path(cfg.out)
    dtype = str(weights["emb.weight"].dtype)[6:]
    why_none = ""
    if cfg.to == "rwkvtune":
        check_for_rwkvtune(config, tokenizer, cfg.model)
        remove_older(folder)
        write(weights, folder / "model.pth")
        settings = rwkvtune_settings(config)
        write_rwkvtune_vocab(tokenizer, folder)
    else:
        remove_older(folder)
        # transformers wants to be told the format
        theirs = hub_tensors(weights, config.version)
        write(theirs, folder / "model.safetensors", {"format": "pt"})
        settings = hub_settings(config, dtype, tokenizer)
        why_none = write_tokenizer(tokenizer, folder)
    if why_none:
        warn(f"AutoTokenizer will not read tokenizer {tokenizer.name}: {why_none}")
    other_ranks = ranks_of_six(config)
    if other_ranks:
        warn(f"llama.cpp's converter will not do for {other_ranks}; take export.py gguf")
    for file, value in settings.items():
        write_json(folder / file, value)
    if "auto_map" in settings["config.json"]:
        write_model(folder)
    kind = settings["config.json"]["architectures"][0]
    print(
        f"{folder}: {kind}, {config.n_layer} layers of width {config.n_embd}, "
        f"tokenizer {tokenizer.name}"
    )


# ----------------------------------------------------------------------------------------------
# gguf: llama.cpp


@dataclass
class GgufConfig(LoraConfig):
    tokenizer: str = ""  # name or file; empty = as the model's folder says, or World if V is 65536


def gguf(cfg):
    """A whole RWKV-6 or 7, merged with a LoRA or as it is, with its tokenizer."""
    check_out(cfg, (".gguf",))
    if not cfg.adapter and (cfg.alpha or cfg.rslora or cfg.another_base):
        raise UserError("--alpha, --rslora and --another_base are of a LoRA: give --adapter=LORA")
    gguf_package()  # before anything is read that takes long
    weights = read_weights(cfg.model)
    check_kind(weights, cfg.model, "a GGUF file")
    config = config_of(weights, cfg.model)
    if config.version == "x070" and config.head_size != 64:  # read without an error, other logits
        raise UserError(
            f"{cfg.model} is RWKV-7 with heads of {config.head_size}; llama.cpp computes RWKV-7 "
            "with heads of 64 alone"
        )
    tokenizer = tokenizer_of(cfg.model, config.vocab_size, cfg.tokenizer)
    if cfg.adapter:
        check_numbers(weights, cfg.model)
        check_origin(weights, config, cfg)
        merge_lora(weights, cfg)
        check_kind(weights, cfg.adapter, "a GGUF file")
    dtype = cfg.dtype or str(weights["emb.weight"].dtype)[6:]
    dtype = "float32" if dtype == "float64" else dtype
    weights = whole_network(weights, config, cfg.model)
    n_tensors = write_gguf(weights, config, tokenizer, dtype, cfg.out)
    megabytes = Path(cfg.out).stat().st_size / 1e6
    print(
        f"{cfg.out}: RWKV-{config.version[2]}, {n_tensors} tensors, {dtype}, {megabytes:,.2f} MB, "
        f"tokenizer {tokenizer.name}"
    )


# ----------------------------------------------------------------------------------------------
# onnx


@dataclass
class OnnxConfig(Config):
    length: NonNegativeInt = 0  # tokens of each call; 0 = any number, 1 = no loop in the graph


def onnx(cfg):
    """A whole RWKV-6 or 7 in float32; gosling/onnx_file.py has its inputs and outputs."""
    check_out(cfg, (".onnx",))
    data = Path(f"{cfg.out}.data")  # of large models
    if data.exists() and not cfg.overwrite:
        raise UserError(f"{data} is already there; choose another --out, or give --overwrite")
    if cfg.dtype not in ("", "float32"):
        raise UserError(f"--dtype={cfg.dtype}: onnx is written in float32; leave the flag out")
    onnx_package()  # before anything is read that takes long
    weights = read_weights(cfg.model)
    check_kind(weights, cfg.model, "an ONNX file")
    model = from_pretrained(cfg.model, weights=weights)
    write_onnx(model, cfg.out, cfg.length)
    difference = check_onnx(model, cfg.out, cfg.length)
    checked = "not checked, onnxruntime is not installed"
    if difference is not None:
        checked = f"onnxruntime's logits agree to {difference:.1e} of their standard deviation"
    number = {0: "any number of tokens", 1: "one token"}.get(cfg.length, f"{cfg.length} tokens")
    print(f"{cfg.out}: RWKV-{model.config.version[2]}, float32, {number} a call; {checked}")


# ----------------------------------------------------------------------------------------------
# inspect


@dataclass
class InspectConfig:
    file: tyro.conf.Positional[str]  # a model, a LoRA, a state; a Hugging Face folder


def inspect(cfg):
    """Print what the file is, and what is odd about it."""
    weights = read_weights(cfg.file)
    odd = [problem for problem in map(wrong_numbers, weights, weights.values()) if problem]
    lora = [name for name in weights if name.endswith(".lora_A")]
    states = [name for name in weights if name.endswith(".time_state")]
    if lora:
        metadata = read_metadata(cfg.file)
        r = "/".join(sorted({str(len(weights[name])) for name in lora}))
        alpha, rslora = metadata.get("alpha", "?"), metadata.get("rslora", "?")
        what = f"a LoRA of rank {r}, alpha {alpha}, rslora {rslora}, {len(lora)} matrices, "
        what += f"{len(weights) - 2 * len(lora)} extra tensors"
    elif states and len(states) == len(weights):
        what = f"a tuned state of {len(states)} layers, each {shape_of(weights[states[0]])}"
    else:
        what, odd_tensors = inspect_network(weights, states, cfg.file)
        odd += odd_tensors
    print(f"{cfg.file}: {what}\n{total(weights)}")
    for line in odd or ["nothing"]:
        print(f"odd: {line}")


def inspect_network(weights, states, file):
    """-> (what network it is, what is odd about it); states: names of tuned states inside."""
    config, odd = config_of(weights, file), []
    what = f"RWKV-{config.version[2]}: "
    what += ", ".join(f"{size} {value}" for size, value in vars(config).items() if value)
    if "score.weight" in weights:
        what += ", a reward model (score.weight)"
    if states:
        inside = f"a tuned state of {len(states)} layers is inside"
        odd.append(f"{inside}; the rwkv package ignores it in RWKV-7 files")
    return what, odd + tensor_problems(weights, expected_shapes(config, weights))


COMMANDS = {
    "merge": (MergeConfig, merge),
    "convert": (ConvertConfig, convert),
    "hub": (HubConfig, hub),
    "gguf": (GgufConfig, gguf),
    "onnx": (OnnxConfig, onnx),
    "state": (StateConfig, state),
    "inspect": (InspectConfig, inspect),
}


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__)
        return
    if argv[0] not in COMMANDS:
        sys.exit(
            f"error: {argv[0]} is not a command of export.py; expected one of {', '.join(COMMANDS)}"
        )
    config, command = COMMANDS[argv[0]]
    command(read_flags(config, argv[1:]))


if __name__ == "__main__":
    main()
