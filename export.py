"""Weights for elsewhere: merge, convert, a Hugging Face folder, states for other engines, a look.

    python export.py merge --model=base.pth --adapter=lora.safetensors --out=merged.pth
    python export.py merge --model=base.pth --state=state.pth --out=merged.pth      for RWKV-6
    python export.py convert --model=a.pth --out=b.safetensors --dtype=bfloat16     or bit for bit
    python export.py hub --model=a.pth --out=folder            RWKV-7 for transformers and fla
    python export.py hub --model=folder --out=a.pth            and back
    python export.py state --state=a.pth --out=a.st --to=web-rwkv                   for Ai00
    python export.py inspect a.pth                             what it is, and what is odd

Each command has its own --help. Nothing is overwritten without --overwrite; a file appears whole or
not at all.

A hub folder is what flash-linear-attention's RWKV7ForCausalLM reads: pip install
flash-linear-attention, `import fla`, AutoModelForCausalLM.from_pretrained(folder). All weights are
in one model.safetensors, both ways: no shards. Layer 0's v0/v1/v2, which are never used and which
fla does not have, are left out. A tokenizer.json goes along as it is; any other tokenizer as a
vocab.txt, which transformers does not read, but prepare.load_tokenizer(folder) does.
"""

import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

from gosling.config import UserError, read_flags
from gosling.files import read_json, write_json
from gosling.tokenizer import tokenizer_of
from gosling.tune import shape_of
from gosling.weights import (
    config_of,
    empty_network,
    read_metadata,
    read_state,
    read_weights,
    same_size,
    tensor_problems,
    write_state,
    write_weights,
)
from model import NEVER_TRAINED, RWKVConfig
from wkv_cuda.fused import as_float32

# ----------------------------------------------------------------------------------------------
# reading, checking, writing

WEIGHTS = (".pth", ".safetensors")


@dataclass
class Config:
    model: str  # the file to read, .pth or .safetensors; hub: or a folder, to go back
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
        if dtype and weights[name].is_floating_point():
            weights[name] = weights[name].to(getattr(torch, dtype))
        if not weights[name].isfinite().all():
            raise UserError(
                f"{name} would be NaN or infinite as {weights[name].dtype}; "
                "export.py inspect says which file has it"
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


def warn(text):
    print(f"warning: {text}", file=sys.stderr)


def total(weights):
    """'1,234 parameters, float32, 0.01 MB'"""
    dtypes = ", ".join(sorted({str(w.dtype)[6:] for w in weights.values()}))
    n_parameters = sum(w.numel() for w in weights.values())
    megabytes = sum(w.nbytes for w in weights.values()) / 1e6
    return f"{n_parameters:,} parameters, {dtypes}, {megabytes:,.2f} MB"


def expected_shapes(config, with_score=False):
    """{official name: shape} of every parameter."""
    return {name: p.shape for name, p in empty_network(config, with_score).named_parameters()}


# ----------------------------------------------------------------------------------------------
# merge, convert


@dataclass
class MergeConfig(Config):
    adapter: str = ""  # a LoRA, gosling's or RWKV-PEFT's; its extra tensors replace the base's
    state: str = ""  # a tuned state, .pth; goes into the file as it is, for engines of RWKV-6
    alpha: float | None = None  # LoRA: that it was trained with; empty = what its .safetensors says
    rslora: bool = False  # LoRA: its scale is alpha / sqrt(r); a .safetensors says it


def merge(cfg):
    check_out(cfg, WEIGHTS)
    if not cfg.adapter and not cfg.state:
        raise UserError("nothing to merge: give --adapter=LORA or --state=STATE")
    weights = read_weights(cfg.model)
    config = config_of(weights, cfg.model)
    if cfg.adapter:
        merge_lora(weights, cfg)
    cast(weights, cfg.dtype)
    if cfg.state:
        merge_state(weights, config, cfg)
    write(weights, cfg.out)


def merge_lora(weights, cfg):
    """W <- W + scale B A in `weights`, computed in float32; other tensors replace the base's."""
    adapter, metadata = read_weights(cfg.adapter), read_metadata(cfg.adapter)
    if not any(name.endswith(".lora_A") for name in adapter):
        raise UserError(
            f"{cfg.adapter} is not a LoRA, it has no lora_A but {', '.join(list(adapter)[:2])} …; "
            "a tuned state goes to --state"
        )
    if cfg.alpha is None and "alpha" not in metadata:
        raise UserError(
            f"{cfg.adapter} does not say its alpha; give the --alpha that it was trained with "
            "(RWKV-PEFT: lora_alpha of its command line, by default 32)"
        )
    alpha = float(metadata["alpha"]) if cfg.alpha is None else cfg.alpha
    rslora = cfg.rslora or metadata.get("rslora") == "True"
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
    cast(state, "")
    size = [config.n_embd // config.head_size, config.head_size, config.head_size]
    expected = {f"blocks.{i}.att.time_state": size for i in range(config.n_layer)}
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


def convert(cfg):
    check_out(cfg, WEIGHTS)
    weights, metadata = read_weights(cfg.model), read_metadata(cfg.model)
    if cfg.dtype:
        cast(weights, cfg.dtype)
    if "alpha" in metadata and Path(cfg.out).suffix == ".pth":
        warn(
            f"a .pth cannot carry this LoRA's alpha={metadata['alpha']}, "
            f"rslora={metadata.get('rslora')}; write them down, merging it will ask"
        )
    write(weights, cfg.out, metadata or None)


# ----------------------------------------------------------------------------------------------
# tuned states


@dataclass
class StateConfig:
    state: str  # the file to read
    out: str  # the file to write: .pth, for web-rwkv .st
    from_: Annotated[Literal["rwkv", "web-rwkv"], tyro.conf.arg(name="from")] = "rwkv"  # what it is
    to: Literal["rwkv", "web-rwkv"] = "rwkv"  # rwkv: gosling, RWKV-PEFT, RWKV-Runner, rwkv package
    overwrite: bool = False  # replace --out if it is there


def state(cfg):
    """rwkv: blocks.{i}.att.time_state [H, value, key], .pth. web-rwkv: the same names, [H, key,
    value] in float16, .st.

    The rwkv package's own state is [value, key] in RWKV-7 and [key, value] in RWKV-6: code that
    hands a file's tensors to an RWKV-6 there transposes them.
    """
    check_out(cfg, (".st",) if cfg.to == "web-rwkv" else (".pth",))
    value, about = read_state(cfg.state)
    if cfg.from_ == "web-rwkv":
        value["wkv"] = value["wkv"].mT
    if cfg.to == "rwkv":
        write_state(value, cfg.out, **about)
    else:
        if value["att_shift"].any() or value["ffn_shift"].any():
            warn("web-rwkv does not read shift vectors; they are left out")
        layers = value["wkv"][:, 0].mT.contiguous()  # [L, H, key, value]
        weights = {f"blocks.{i}.att.time_state": wkv for i, wkv in enumerate(layers)}
        cast(weights, "float16")
        write_weights(weights, cfg.out)
    L, _, H, N, _ = value["wkv"].shape
    print(f"{cfg.out}: a state of {L} layers, {H} heads of {N}, for {cfg.to}")


# ----------------------------------------------------------------------------------------------
# hub: flash-linear-attention's RWKV-7


@dataclass
class HubConfig(Config):
    tokenizer: str = ""  # name or file; empty = as the model's folder says, or World if V is 65536


# What every RWKV-7 has and our network has built in: written to config.json, and demanded of one
# that is read. fla's head norm has eps = head_dim * norm_eps, RWKV's is 64e-5 always: the same for
# heads of 64 alone.
FIXED = dict(
    model_type="rwkv7",
    head_dim=64,
    hidden_act="sqrelu",
    norm_first=True,
    norm_bias=True,
    norm_eps=1e-5,
    attn=None,
    tie_word_embeddings=False,
)
RENAMED = {
    "emb": "model.embeddings",
    "ln_out": "model.norm",
    "head": "lm_head",
    "ln0": "pre_norm",
    "ln1": "attn_norm",
    "ln2": "ffn_norm",
    "att.receptance": "attn.r_proj",
    "att.key": "attn.k_proj",
    "att.value": "attn.v_proj",
    "att.output": "attn.o_proj",
    "att.ln_x": "attn.g_norm",
}
LOW_RANK = {"0": "2.bias", "1": "0.weight", "2": "2.weight"}  # of w0, w1, w2 in fla's Sequential

# What prepare.render_chat writes: blank lines only between turns, none inside them; the end token
# after a last reply. tokenizer.apply_chat_template(..., enable_thinking=True or False) begins a
# reply with one of G1's prefixes.
CHAT_TEMPLATE = """\
{%- for message in messages %}
    {%- set text = message['content'].strip().split('\\n') | select | join('\\n') %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('a role is system, user or assistant, not ' + message['role']) }}
    {%- endif %}
    {{- ((message['role'] | capitalize) + ': ' + text).rstrip() }}
    {%- if not loop.last or add_generation_prompt %}{{ '\\n\\n' }}
    {%- elif message['role'] == 'assistant' %}{{ eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}
    {%- if enable_thinking is defined %}
        {{- ' <think' if enable_thinking else ' <think>\\n</think' }}
    {%- endif %}
{%- endif %}
"""


def fla_name(name):
    """Official name -> (fla's, transposed?).

    Low-rank pairs are [in, rank] here, Linear layers [rank, in] there, and what is added to them is
    the second one's bias.
    """
    layer, rest = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)", name).groups()
    prefix = f"model.layers.{layer}." if layer else ""
    pair = re.fullmatch(r"att\.([wavg])([012])", rest)
    if pair:
        return f"{prefix}attn.{pair[1]}_lora.lora.{LOW_RANK[pair[2]]}", pair[2] != "0"
    module, _, leaf = rest.rpartition(".")
    return f"{prefix}{RENAMED.get(module, module.replace('att', 'attn'))}.{leaf}", False


def read_folder(folder):
    """A hub folder -> {official name: tensor}, vectors as [C]; what has none keeps its own name."""
    config = read_json(Path(folder, "config.json"))
    for key, value in FIXED.items():
        if config.get(key, value) != value:
            raise UserError(
                f"{Path(folder, 'config.json')}: {key} is {config.get(key)!r}, expected {value!r}: "
                "a folder of fla's RWKV-7, as export.py hub writes it"
            )
    theirs, weights = read_weights(Path(folder, "model.safetensors")), {}
    layers = {name.split(".")[2] for name in theirs if name.startswith("model.layers.")}
    any_sizes = RWKVConfig("x070", len(layers) or 1, 64, 1)  # for the names alone
    for name in expected_shapes(any_sizes):
        new_name, transposed = fla_name(name)
        if new_name in theirs:
            w = theirs.pop(new_name)
            weights[name] = w.T if transposed else w
    return weights | theirs


def hub(cfg):
    back = Path(cfg.model).is_dir()
    check_out(cfg, WEIGHTS if back else ())
    weights = read_folder(cfg.model) if back else read_weights(cfg.model)
    config = config_of(weights, cfg.model)
    if (config.version, config.head_size) != ("x070", 64):
        # fla's RWKV-6 normalises heads with eps 1e-5, not 64e-5
        raise UserError(
            f"{cfg.model} is {config.version} with heads of {config.head_size}; "
            "hub is for x070 with heads of 64"
        )
    if "score.weight" in weights:
        raise UserError(f"{cfg.model} is a reward model; fla's RWKV-7 has no score.weight")
    shapes = expected_shapes(config)
    problems = tensor_problems(weights, shapes)
    if problems:
        raise UserError(f"{cfg.model}: {problems[0]}; hub wants a whole RWKV-7 and nothing else")
    names = [name for name in shapes if name not in NEVER_TRAINED]
    weights = {name: weights[name].reshape(shapes[name]) for name in names}
    cast(weights, cfg.dtype)
    if back:
        write(weights, cfg.out)
    else:
        write_folder(weights, config, cfg)


def write_folder(weights, config, cfg):
    """A hub folder of {official name: tensor}, which is emptied, and of the model's tokenizer."""
    tokenizer, folder = tokenizer_of(cfg.model, config.vocab_size, cfg.tokenizer), Path(cfg.out)
    dtype = str(weights["emb.weight"].dtype)[6:]
    theirs = {}
    for name in list(weights):
        new_name, transposed = fla_name(name)
        w = weights.pop(name)
        if transposed:
            w = w.T
        elif w.dim() == 3 and ".attn.x_" not in new_name:  # these alone stay [1, 1, C]
            w = w.flatten()
        theirs[new_name] = w
    write(theirs, folder / "model.safetensors", {"format": "pt"})  # transformers wants to be told
    for file_of_older_export in ("tokenizer.json", "vocab.txt"):
        (folder / file_of_older_export).unlink(missing_ok=True)
    end_token = "<|endoftext|>"
    if hasattr(tokenizer, "hub"):
        end_token = tokenizer.hub.id_to_token(tokenizer.end_id)
    tokenizer.text = tokenizer.text or vocab_text(tokenizer)
    tokenizer.save(folder)
    for file, value in hub_settings(config, dtype, tokenizer.end_id, end_token).items():
        write_json(folder / file, value)
    print(
        f"{folder}: RWKV7ForCausalLM, {config.n_layer} layers of width {config.n_embd}, "
        f"tokenizer {tokenizer.name}"
    )


def vocab_text(tokenizer):
    """The vocab file of a tokenizer that is built in."""
    if tokenizer.words:
        lines = [token.decode() for token in tokenizer.tokens.values()]
    else:
        lines = [f"{i} {token!r} {len(token)}" for i, token in tokenizer.tokens.items()]
    return "".join(line + "\n" for line in lines)


def hub_settings(config, dtype, end_id, end_token):
    """{file: value} of a hub folder's JSON files."""
    ids = dict(bos_token_id=end_id, eos_token_id=end_id)
    tokenizer = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        bos_token=end_token,
        eos_token=end_token,
        pad_token=end_token,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )
    # transformers' own top_k of 50 would not be the model's distribution.
    sampling = dict(pad_token_id=end_id, do_sample=True, temperature=1.0, top_p=1.0, top_k=0)
    # There is no pad_token_id in the network's config: fla would hand it to the embedding as
    # padding_idx, and that row would stop learning.
    network = dict(
        architectures=["RWKV7ForCausalLM"],
        **FIXED,
        **ids,
        attn_mode="chunk",
        hidden_size=config.n_embd,
        num_hidden_layers=config.n_layer,
        num_heads=config.n_embd // config.head_size,
        value_dim=[config.n_embd] * config.n_layer,
        intermediate_size=config.dim_ffn,
        hidden_ratio=config.dim_ffn / config.n_embd,
        vocab_size=config.vocab_size,
        decay_low_rank_dim=config.decay_rank,
        a_low_rank_dim=config.iclr_rank,
        v_low_rank_dim=config.value_rank,
        gate_low_rank_dim=config.gate_rank,
        use_cache=True,
        torch_dtype=dtype,
    )
    return {
        "tokenizer_config.json": tokenizer,
        "generation_config.json": {**ids, **sampling},
        "config.json": network,
    }


# ----------------------------------------------------------------------------------------------
# inspect


@dataclass
class InspectConfig:
    file: tyro.conf.Positional[str]  # a model, a LoRA, a state, .pth or .safetensors; a hub folder


def inspect(cfg):
    """Print what the file is, and what is odd about it."""
    weights = read_folder(cfg.file) if Path(cfg.file).is_dir() else read_weights(cfg.file)
    odd = []
    for name, w in weights.items():
        n_wrong = int((~w.isfinite()).sum())
        if n_wrong:
            odd.append(f"{name} has {n_wrong} values that are NaN or infinite")
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
    network = {name: w for name, w in weights.items() if name not in states}
    return what, odd + tensor_problems(network, expected_shapes(config, "score.weight" in weights))


COMMANDS = {
    "merge": (MergeConfig, merge),
    "convert": (Config, convert),
    "hub": (HubConfig, hub),
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
