"""Weights for elsewhere: merge a LoRA or a tuned state, change format or precision, a Hugging Face folder, look inside.

    python export.py merge --model=base.pth --adapter=lora.safetensors --out=merged.pth    W + scale B A, in one file
    python export.py merge --model=base.pth --state=state.pth --out=merged.pth             RWKV-6: the state goes inside
    python export.py convert --model=a.pth --out=b.safetensors --dtype=bfloat16            no --dtype: bit for bit
    python export.py hub --model=a.pth --out=folder                                        RWKV-7 for transformers, fla
    python export.py hub --model=folder --out=a.pth                                        and back
    python export.py state --state=a.pth --out=a.st --to=web-rwkv                          a tuned state for Ai00, web-rwkv
    python export.py state --state=list.pth --out=b.pth --from=statetuning                 RWKV-StateTuning's list of tensors
    python export.py inspect a.pth                                                         what it is, and what is odd

Each command has its own --help. Nothing is overwritten without --overwrite; a file appears whole or not at all.

A hub folder is what flash-linear-attention's RWKV7ForCausalLM reads: pip install flash-linear-attention, `import fla`,
AutoModelForCausalLM.from_pretrained(folder). All weights are in one model.safetensors, both ways: no shards. Layer 0's
v0/v1/v2, which are never used and fla has not, are left out. A tokenizer.json goes along as it is; any other tokenizer
as a vocab.txt, which transformers does not read, but prepare.load_tokenizer(folder) does.
"""

import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro

import common
import prepare
from common import UserError
from model import (
    NEVER_TRAINED,
    RWKV,
    RWKVConfig,
    config_of,
    fp32,
    read_metadata,
    read_state,
    read_weights,
    write_state,
    write_weights,
)

# ---------------------------------------------------------------------------------------------------------------------
# reading, checking, writing


@dataclass
class Config:
    model: str  # the file to read, .pth or .safetensors; hub: or a folder, to go back
    out: str  # the file to write, .pth or .safetensors; hub: a folder, or on the way back a file
    dtype: Literal["", "float32", "bfloat16", "float16"] = (
        ""  # of what is written; empty = as it is, bit for bit
    )
    overwrite: bool = False  # replace --out if it is there


def check_out(cfg, *endings):
    """--out is of the right kind, a folder where there are no `endings`, and may be written."""
    if (Path(cfg.out).suffix in (endings or (".pth", ".safetensors"))) != bool(endings):
        raise UserError(
            f"--out={cfg.out}: expected "
            + (f"a name in {' or '.join(endings)}" if endings else "a folder")
        )
    if Path(cfg.out).exists() and not cfg.overwrite:
        raise UserError(f"{cfg.out} is already there; choose another --out, or give --overwrite")


def cast(weights, dtype):
    """Every tensor of floats in `dtype` ("": as it is), where none may be NaN or infinite."""
    for name, w in weights.items():
        w = weights[name] = w.to(getattr(torch, dtype)) if dtype and w.is_floating_point() else w
        if not w.isfinite().all():
            raise UserError(
                f"{name} would be NaN or infinite as {w.dtype}; export.py inspect says which file has it"
            )
    return weights


def write(weights, out, metadata=None):
    """To .pth or .safetensors; each tensor as a copy, since safetensors refuses views and torch.save writes all behind
    one. `weights` is emptied on the way, so that memory holds one model, not two."""
    weights = {
        name: weights.pop(name).clone(memory_format=torch.contiguous_format)
        for name in list(weights)
    }
    write_weights(weights, out, metadata)
    print(f"{out}: {total(weights)}")


def total(weights):
    dtypes, size = (
        sorted({str(w.dtype)[6:] for w in weights.values()}),
        sum(w.nbytes for w in weights.values()),
    )
    return f"{sum(w.numel() for w in weights.values()):,} parameters, {', '.join(dtypes)}, {size / 1e6:,.2f} MB"


def expected_shapes(config):
    """{official name: shape} of every parameter."""
    with torch.device("meta"):
        return {name: p.shape for name, p in RWKV(config).named_parameters()}


def shape(w):
    return "absent" if w is None else list(w.shape)


def same_size(one, other):
    """[C] and [1, 1, C] are one vector, [C, R] and [R, C] are not one matrix."""
    return [n for n in one if n > 1] == [n for n in other if n > 1]


def problems(weights, expected):
    """A phrase for each tensor that is missing, extra, or of another size than in `expected`, {name: shape}; a reward
    model's score.weight is neither."""
    return [
        f"{name} is missing"
        for name in expected
        if name not in weights and name not in NEVER_TRAINED
    ] + [
        f"{name} is {shape(w)}, expected {list(expected[name])}"
        if name in expected
        else f"{name} {shape(w)} is extra"
        for name, w in weights.items()
        if name != "score.weight"
        and (name not in expected or not same_size(w.shape, expected[name]))
    ]


# ---------------------------------------------------------------------------------------------------------------------
# merge, convert


@dataclass
class MergeConfig(Config):
    adapter: str = (
        ""  # a LoRA file, gosling's or RWKV-PEFT's; its extra trained tensors replace the base's
    )
    state: str = ""  # a tuned state, .pth; goes into the file as it is, for engines of RWKV-6
    alpha: float | None = (
        None  # LoRA: the alpha it was trained with; empty = what its .safetensors says
    )
    rslora: bool = (
        False  # LoRA: it was trained with rslora: scale alpha / sqrt(r); a .safetensors says it
    )


def add_lora(weights, cfg):
    """W <- W + scale B A in `weights`, computed in float32, and the adapter's other tensors in place of the base's."""
    adapter, says = read_weights(cfg.adapter), read_metadata(cfg.adapter)
    if not any(name.endswith(".lora_A") for name in adapter):
        raise UserError(
            f"{cfg.adapter} is not a LoRA, it has no lora_A but {', '.join(list(adapter)[:2])} …; "
            "a tuned state goes to --state"
        )
    if cfg.alpha is None and "alpha" not in says:
        raise UserError(
            f"{cfg.adapter} does not say its alpha; give the --alpha that it was trained with "
            "(RWKV-PEFT: lora_alpha of its command line, by default 32)"
        )
    alpha = float(says["alpha"]) if cfg.alpha is None else cfg.alpha
    rslora = cfg.rslora or says.get("rslora") == "True"
    for name in sorted(
        {re.sub(r"lora_[AB]$", "weight", name) for name in adapter}
    ):  # of the base's tensors
        matrix, old = name.removesuffix(".weight"), weights.get(name)
        A, B, extra = (adapter.get(n) for n in (f"{matrix}.lora_A", f"{matrix}.lora_B", name))
        a, b, x, there = (shape(w) for w in (A, B, extra, old))
        if name == "score.weight":  # a reward model's head, which the base has not
            weights[name] = extra
            continue
        if (
            there == "absent"
            or extra is not None
            and not same_size(x, there)
            or (not a == b == "absent" and (a[1:], b) != (there[1:], [there[0], a[0]]))
        ):
            raise UserError(
                f"{cfg.adapter} belongs to another base, or is not whole: {name}, {there} in {cfg.model}, "
                f"has lora_A {a}, lora_B {b}, replacement {x} here; give the --model it was trained on"
            )
        w = fp32(old if extra is None else extra).reshape(old.shape)
        if A is not None:
            w = w + alpha / (math.sqrt(len(A)) if rslora else len(A)) * (fp32(B) @ fp32(A))
        weights[name] = w if cfg.dtype else w.to(old.dtype)  # `cast` goes to cfg.dtype from float32
    print(f"{cfg.adapter}: {len(adapter)} tensors merged, alpha {alpha:g}{', rslora' * rslora}")


def merge(cfg):
    check_out(cfg, ".pth", ".safetensors")
    if not cfg.adapter and not cfg.state:
        raise UserError("nothing to merge: give --adapter=LORA or --state=STATE")
    weights = read_weights(cfg.model)
    c = config_of(weights, cfg.model)
    if cfg.adapter:
        add_lora(weights, cfg)
    cast(weights, cfg.dtype)
    if cfg.state:  # blocks.{i}.att.time_state [H, N, N], one a layer
        state, size = (
            cast(read_weights(cfg.state), ""),
            [c.n_embd // c.head_size, c.head_size, c.head_size],
        )
        if wrong := problems(state, {f"blocks.{i}.att.time_state": size for i in range(c.n_layer)}):
            raise UserError(
                f"{cfg.state} does not fit {cfg.model}: {wrong[0]}; give the --model it was tuned on"
            )
        weights.update(state)
        if c.version == "x070":
            print(
                "warning: the rwkv package silently ignores a state inside an RWKV-7 file; ship the state file "
                "beside the model, and give it to the engine as the initial state",
                file=sys.stderr,
            )
    write(weights, cfg.out)


def convert(cfg):
    check_out(cfg, ".pth", ".safetensors")
    weights, metadata = read_weights(cfg.model), read_metadata(cfg.model)
    if cfg.dtype:
        cast(weights, cfg.dtype)
    if "alpha" in metadata and Path(cfg.out).suffix == ".pth":
        print(
            f"warning: a .pth cannot carry this LoRA's alpha={metadata['alpha']}, rslora={metadata.get('rslora')}; "
            "write them down, merging it will ask",
            file=sys.stderr,
        )
    write(weights, cfg.out, metadata or None)


# ---------------------------------------------------------------------------------------------------------------------
# tuned states


@dataclass
class StateConfig:
    state: str  # the file to read
    out: str  # the file to write: .pth, for web-rwkv .st
    from_: Annotated[Literal["rwkv", "web-rwkv", "statetuning"], tyro.conf.arg(name="from")] = (
        "rwkv"  # what it is
    )
    to: Literal["rwkv", "web-rwkv"] = (
        "rwkv"  # rwkv: gosling's own, RWKV-PEFT, RWKV-Runner, the rwkv package
    )
    overwrite: bool = False  # replace --out if it is there


def state(cfg):
    """rwkv: blocks.{i}.att.time_state [H, value, key], .pth. web-rwkv: the same names, [H, key, value] in float16, .st.
    statetuning: a list of att shift [C], state [H, value, key], ffn shift [C] of each layer; its shifts go to the .json
    beside, which gosling alone reads. The rwkv package's own state is [value, key] in RWKV-7 and [key, value] in RWKV-6:
    code that hands a file's tensors to an RWKV-6 there transposes them."""
    check_out(cfg, ".st" if cfg.to == "web-rwkv" else ".pth")
    about = {}
    if cfg.from_ == "statetuning":
        tensors = common.load_torch(cfg.state)
        if (
            not isinstance(tensors, list)
            or len(tensors) % 3
            or not all(isinstance(w, torch.Tensor) for w in tensors)
            or [w.dim() for w in tensors[1::3]] != [3] * (len(tensors) // 3)
        ):
            raise UserError(
                f"{cfg.state} is not RWKV-StateTuning's list of shift, state, shift for each layer"
            )
        att, wkv, ffn = (
            torch.stack([w.detach().float().cpu() for w in tensors[i::3]]) for i in range(3)
        )
        value = {
            "wkv": wkv[:, None],
            "att_shift": att.flatten(1)[:, None],
            "ffn_shift": ffn.flatten(1)[:, None],
        }
    else:
        value, about = read_state(cfg.state)
        if cfg.from_ == "web-rwkv":
            value["wkv"] = value["wkv"].mT
    L, _, H, N, _ = value["wkv"].shape
    if cfg.to == "web-rwkv":
        if value["att_shift"].any() or value["ffn_shift"].any():
            print(
                "warning: web-rwkv does not read shift vectors; they are left out", file=sys.stderr
            )
        weights = {f"blocks.{i}.att.time_state": w.mT for i, w in enumerate(value["wkv"][:, 0])}
        write_weights(
            {name: w.contiguous() for name, w in cast(weights, "float16").items()}, cfg.out
        )
    else:
        write_state(value, cfg.out, **about)
    print(f"{cfg.out}: a state of {L} layers, {H} heads of {N}, for {cfg.to}")


# ---------------------------------------------------------------------------------------------------------------------
# hub: flash-linear-attention's RWKV-7


@dataclass
class HubConfig(Config):
    tokenizer: str = (
        ""  # name or file; empty = what the model's folder says, or World if it has 65536 ids
    )


# what every RWKV-7 has and our network has built in: written to config.json, and demanded of one that is read.
# fla's head norm has eps = head_dim * norm_eps, RWKV's is 64e-5 always: the same for heads of 64 alone.
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


def fla_name(name):
    """Official name -> (fla's, transposed?). Low-rank pairs are [in, rank] here, Linear layers [rank, in] there, and
    what is added to them is the second one's bias."""
    layer, rest = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)", name).groups()
    prefix = f"model.layers.{layer}." if layer else ""
    pair = re.fullmatch(r"att\.([wavg])([012])", rest)
    if pair:
        return (
            f"{prefix}attn.{pair[1]}_lora.lora.{['2.bias', '0.weight', '2.weight'][int(pair[2])]}",
            pair[2] != "0",
        )
    module, _, leaf = rest.rpartition(".")
    return f"{prefix}{RENAMED.get(module, module.replace('att', 'attn'))}.{leaf}", False


def read_folder(folder):
    """A hub folder -> {official name: tensor}, vectors as [C]."""
    config = Path(folder, "config.json")
    says = prepare.read_json(config)
    for key, value in FIXED.items():
        if says.get(key, value) != value:
            raise UserError(
                f"{config}: {key} is {says.get(key)!r}, expected {value!r}: a folder of fla's RWKV-7, as "
                "export.py hub writes it"
            )
    theirs, weights = read_weights(Path(folder, "model.safetensors")), {}
    layers = {name.split(".")[2] for name in theirs if name.startswith("model.layers.")}
    for name in expected_shapes(
        RWKVConfig("x070", len(layers) or 1, 64, 1)
    ):  # names alone: any sizes do
        new, transposed = fla_name(name)
        if new in theirs:
            w = theirs.pop(new)
            weights[name] = w.T if transposed else w
    return weights | theirs  # what has no official name keeps its own, to be reported


# What prepare.render_chat writes: blank lines only between turns, none inside them; the end token after a last reply.
# tokenizer.apply_chat_template(..., enable_thinking=True or False) begins a reply with one of G1's prefixes.
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
    {%- if enable_thinking is defined %}{{ ' <think' if enable_thinking else ' <think>\\n</think' }}{% endif %}
{%- endif %}
"""


def hub(cfg):
    back = Path(cfg.model).is_dir()
    check_out(cfg, *(".pth", ".safetensors") * back)
    weights = read_folder(cfg.model) if back else read_weights(cfg.model)
    c = config_of(weights, cfg.model)
    if (c.version, c.head_size) != (
        "x070",
        64,
    ):  # fla's RWKV-6 normalises heads with eps 1e-5, not 64e-5
        raise UserError(
            f"{cfg.model} is {c.version} with heads of {c.head_size}; hub is for x070 with heads of 64"
        )
    if wrong := problems(weights, shapes := expected_shapes(c)):
        raise UserError(
            f"{cfg.model}: {'; '.join(wrong[:5])}{' …' * (len(wrong) > 5)}; hub wants a whole RWKV-7 "
            "and nothing else"
        )
    if "score.weight" in weights:
        raise UserError(f"{cfg.model} is a reward model; fla's RWKV-7 has no score.weight")
    weights = cast(
        {
            name: weights[name].reshape(size)
            for name, size in shapes.items()
            if name not in NEVER_TRAINED
        },
        cfg.dtype,
    )
    if back:
        return write(weights, cfg.out)
    tokenizer, folder = prepare.tokenizer_of(cfg.model, c.vocab_size, cfg.tokenizer), Path(cfg.out)
    theirs, dtype = {}, str(weights["emb.weight"].dtype)[6:]
    for name in list(weights):
        (new, transposed), w = fla_name(name), weights.pop(name)
        # of our [1, 1, C] only att's x_* stay so, others are [C]
        theirs[new] = (
            w.T if transposed else w.flatten() if w.dim() == 3 and ".attn.x_" not in new else w
        )
    write(theirs, folder / "model.safetensors", {"format": "pt"})  # transformers wants to be told
    end = (
        tokenizer.hub.id_to_token(tokenizer.end_id)
        if hasattr(tokenizer, "hub")
        else "<|endoftext|>"
    )
    if not tokenizer.text:  # a built-in one
        tokenizer.text = "".join(
            f"{token.decode()}\n" if tokenizer.words else f"{i} {token!r} {len(token)}\n"
            for i, token in tokenizer.tokens.items()
        )
    for old in ("tokenizer.json", "vocab.txt"):  # of an export into the same folder
        (folder / old).unlink(missing_ok=True)
    prepare.save_tokenizer(tokenizer, folder)
    ids = dict(bos_token_id=tokenizer.end_id, eos_token_id=tokenizer.end_id)
    for file, value in {
        "tokenizer_config.json": dict(
            tokenizer_class="PreTrainedTokenizerFast",
            bos_token=end,
            eos_token=end,
            pad_token=end,
            clean_up_tokenization_spaces=False,
            chat_template=CHAT_TEMPLATE,
        ),
        # top_k = 0: transformers' own default of 50 would not be the model's distribution
        "generation_config.json": dict(
            **ids,
            pad_token_id=tokenizer.end_id,
            do_sample=True,
            temperature=1.0,
            top_p=1.0,
            top_k=0,
        ),
        # no pad_token_id here: fla would hand it to the embedding as padding_idx, and that row would stop learning
        "config.json": dict(
            architectures=["RWKV7ForCausalLM"],
            **FIXED,
            **ids,
            attn_mode="chunk",
            hidden_size=c.n_embd,
            num_hidden_layers=c.n_layer,
            num_heads=c.n_embd // c.head_size,
            value_dim=[c.n_embd] * c.n_layer,
            intermediate_size=c.dim_ffn,
            hidden_ratio=c.dim_ffn / c.n_embd,
            vocab_size=c.vocab_size,
            decay_low_rank_dim=c.decay_rank,
            a_low_rank_dim=c.iclr_rank,
            v_low_rank_dim=c.value_rank,
            gate_low_rank_dim=c.gate_rank,
            use_cache=True,
            torch_dtype=dtype,
        ),
    }.items():
        with common.atomic_write(folder / file) as tmp:
            tmp.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    print(
        f"{folder}: RWKV7ForCausalLM, {c.n_layer} layers of width {c.n_embd}, tokenizer {tokenizer.name}"
    )


# ---------------------------------------------------------------------------------------------------------------------
# inspect


@dataclass
class InspectConfig:
    file: tyro.conf.Positional[
        str
    ]  # .pth or .safetensors: a model, a LoRA, a state; or a hub folder


def inspect(cfg):
    """Print what the file is, and what is odd about it."""
    weights = read_folder(cfg.file) if Path(cfg.file).is_dir() else read_weights(cfg.file)
    odd = [
        f"{name} has {n} values that are NaN or infinite"
        for name, w in weights.items()
        if (n := int((~w.isfinite()).sum()))
    ]
    lora = [name for name in weights if name.endswith(".lora_A")]
    states = [name for name in weights if name.endswith(".time_state")]
    if lora:
        says, ranks = read_metadata(cfg.file), {str(len(weights[name])) for name in lora}
        what = (
            f"a LoRA of rank {'/'.join(sorted(ranks))}, alpha {says.get('alpha', '?')}, rslora "
            f"{says.get('rslora', '?')}, {len(lora)} matrices, {len(weights) - 2 * len(lora)} extra tensors"
        )
    elif states and len(states) == len(weights):
        what = f"a tuned state of {len(states)} layers, each {shape(weights[states[0]])}"
    else:
        config = config_of(weights, cfg.file)
        what = f"RWKV-{config.version[2]}: " + ", ".join(
            f"{k} {v}" for k, v in vars(config).items() if v
        )
        what += ", a reward model (score.weight)" * ("score.weight" in weights)
        if states:
            odd.append(
                f"a tuned state of {len(states)} layers is inside; the rwkv package ignores it in RWKV-7 files"
            )
        odd += problems(
            {name: w for name, w in weights.items() if name not in states}, expected_shapes(config)
        )
    print(
        "\n".join(
            [
                f"{cfg.file}: {what}",
                total(weights),
                *(f"odd: {line}" for line in odd or ["nothing"]),
            ]
        )
    )


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    commands = {
        "merge": (MergeConfig, merge),
        "convert": (Config, convert),
        "hub": (HubConfig, hub),
        "state": (StateConfig, state),
        "inspect": (InspectConfig, inspect),
    }
    if not argv or argv[0] in ("-h", "--help"):
        return print(__doc__)
    if argv[0] not in commands:
        sys.exit(
            f"error: {argv[0]} is not a command of export.py; expected one of {', '.join(commands)}"
        )
    config, command = commands[argv[0]]
    command(common.read_flags(config, argv[1:]))


if __name__ == "__main__":
    main()
