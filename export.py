"""Weights for elsewhere: merge a LoRA or a tuned state, change format or precision, a Hugging Face folder, look inside.

    python export.py merge --model=base.pth --adapter=lora.safetensors --out=merged.pth    W + scale B A, in one file
    python export.py merge --model=base.pth --state=state.pth --out=merged.pth             RWKV-6: the state goes inside
    python export.py convert --model=a.pth --out=b.safetensors --dtype=bfloat16            no --dtype: bit for bit
    python export.py hub --model=a.pth --out=folder                                        RWKV-7 for transformers, fla
    python export.py hub --model=folder --out=a.pth                                        and back
    python export.py inspect a.pth                                                         what it is, and what is odd

Each command has its own --help. Nothing is overwritten without --overwrite; a file appears whole or not at all.

A hub folder is what flash-linear-attention's RWKV7ForCausalLM reads: pip install flash-linear-attention, `import fla`,
AutoModelForCausalLM.from_pretrained(folder). Its tokenizer needs transformers alone. fla has no v0/v1/v2 in layer 0,
where they are never used: they are left out, and come back as a fresh model's initial values.
"""
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tokenizers
import torch
import tyro
from safetensors import safe_open
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

import common
import prepare
from common import UserError
from model import NEVER_TRAINED, RWKV, RWKVConfig, config_of, fp32, init_parameter, read_weights, write_weights

Precision = Literal["", "float32", "bfloat16", "float16"]


# ---------------------------------------------------------------------------------------------------------------------
# reading, checking, writing

def check_out(cfg, kind="file"):
    """--out is of the right kind, and may be written."""
    out, is_file = Path(cfg.out), Path(cfg.out).suffix in (".pth", ".safetensors")
    if is_file != (kind == "file") or out.is_file() > is_file:
        raise UserError(f"--out={out}: expected " + ("a name that ends in .pth or .safetensors" if kind == "file" else
                        "a folder; export.py convert changes a file's format alone"))
    if (any(out.iterdir()) if out.is_dir() else out.exists()) and not cfg.overwrite:
        raise UserError(f"{out} is already there; choose another --out, or give --overwrite")


def cast(weights, dtype):
    """Every tensor of floats in `dtype` ("": as it is); a value that only becomes infinite by it is an error."""
    for name, w in weights.items():
        if dtype and w.is_floating_point():
            weights[name] = w.to(getattr(torch, dtype))
            if w.isfinite().all() and not weights[name].isfinite().all():
                raise UserError(f"{name} has values up to {w.abs().max():.3g}, beyond {dtype}; use --dtype=bfloat16")
    return weights


def write(weights, out, metadata=None):
    """To .pth or .safetensors; each tensor as a copy, since safetensors refuses views and torch.save writes all behind
    one. `weights` is emptied on the way, so that memory holds one model, not two."""
    weights = {name: weights.pop(name).clone(memory_format=torch.contiguous_format) for name in list(weights)}
    write_weights(weights, out, metadata)
    print(f"{out}: {len(weights)} tensors, {dtypes(weights)}, {megabytes(Path(out).stat().st_size)}")


def metadata_of(path):
    """The {str: str} that a .safetensors file carries beside its tensors."""
    if Path(path).suffix != ".safetensors" or not Path(path).is_file():
        return {}
    with safe_open(path, "pt") as f:
        return f.metadata() or {}


def expected_shapes(config):
    """{official name: shape} of every parameter."""
    with torch.device("meta"):
        return {name: p.shape for name, p in RWKV(config).named_parameters()}


def demand_none(wrong, path, remedy):
    if wrong:
        raise UserError(f"{path}: {'; '.join(wrong[:5])}{' …' * (len(wrong) > 5)}; {remedy}")


def same_size(one, other):
    """[C] and [1, 1, C] are one vector, [C, R] and [R, C] are not one matrix."""
    return [n for n in one if n > 1] == [n for n in other if n > 1]


def problems(weights, config):
    """A phrase for each tensor that a model of this config lacks, has too many, or has in another size."""
    expected = expected_shapes(config)
    return [f"{name} is missing" for name in expected if name not in weights and name not in NEVER_TRAINED] + [
        f"{name} {list(w.shape)} is extra" if name not in expected else
        f"{name} is {list(w.shape)}, expected {list(expected[name])}"
        for name, w in weights.items() if name not in expected or not same_size(w.shape, expected[name])]


def dtypes(weights):
    """'bfloat16', or 'bfloat16 (400 tensors, emb.weight …), float32 (12 tensors, blocks.0.att.w0 …)'."""
    kinds = {}
    for name, w in weights.items():
        kinds.setdefault(str(w.dtype)[6:], []).append(name)
    return ", ".join(k + f" ({len(names)} tensors, {names[0]} …)" * (len(kinds) > 1) for k, names in kinds.items())


def megabytes(n):
    return f"{n / 1e9:.2f} GB" if n >= 1e9 else f"{n / 1e6:.2f} MB"


# ---------------------------------------------------------------------------------------------------------------------
# merge

@dataclass
class MergeConfig:
    model: str                   # the base, .pth or .safetensors
    out: str                     # the file to write, .pth or .safetensors
    adapter: str = ""            # a LoRA file, gosling's or RWKV-PEFT's; its extra trained tensors replace the base's
    state: str = ""              # a tuned state, .pth; goes into the file as it is, for engines of RWKV-6
    dtype: Precision = ""        # of what is written; empty = the base's
    alpha: float | None = None   # LoRA: only for files that do not say it (.pth), the alpha it was trained with
    rslora: bool = False         # LoRA: likewise, it was trained with rslora: scale alpha / sqrt(r), not alpha / r
    overwrite: bool = False      # replace --out if it is there


LORA = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.weight)?")  # with what the peft package puts around


def split_adapter(adapter):
    """-> ({matrix: {"A": [r, in], "B": [out, r]}}, {name: any other tensor})"""
    pairs, extra = {}, {}
    for name, w in adapter.items():
        found = LORA.fullmatch(name)
        if found:
            pairs.setdefault(found[1], {})[found[2]] = w
        else:
            extra[name] = w
    return pairs, extra


def add_lora(weights, cfg):
    """W <- W + scale B A in `weights`, computed in float32, and the adapter's other tensors in place of the base's."""
    pairs, extra = split_adapter(read_weights(cfg.adapter))
    if not pairs:
        remedy = "a tuned state goes to --state" if any("time_sta" in name for name in extra) else (
            "what other methods write (DiSHA, Bone, MiSS), the trainer that made it can merge")
        raise UserError(f"{cfg.adapter} is not a LoRA, it has no lora_A but {', '.join(list(extra)[:2])} …; {remedy}")
    says, alpha, rslora = metadata_of(cfg.adapter), cfg.alpha, cfg.rslora
    if "alpha" in says:
        alpha, rslora = float(says["alpha"]), says.get("rslora") == "True"
        if cfg.alpha not in (None, alpha) or cfg.rslora > rslora:
            raise UserError(f"{cfg.adapter} says alpha={alpha:g}, rslora={rslora}; leave --alpha and --rslora out")
    if alpha is None:
        raise UserError(f"{cfg.adapter} does not say its alpha; give the --alpha that it was trained with "
                        "(RWKV-PEFT: lora_alpha of its command line, by default 32)")
    for name in dict.fromkeys([*extra, *(f"{matrix}.weight" for matrix in pairs)]):
        matrix = name.removesuffix(".weight")
        ab, there = pairs.get(matrix, {}), list(weights[name].shape) if name in weights else "absent"
        if ab and (len(ab) != 2 or ab["A"].shape[0] != ab["B"].shape[1]):
            shapes = ", ".join(f"lora_{half} {list(w.shape)}" for half, w in ab.items())
            raise UserError(f"{cfg.adapter}: {matrix} has {shapes}; expected lora_A [r, in] and lora_B [out, r]; is "
                            "the file whole?")
        here = [len(ab["B"]), ab["A"].shape[1]] if ab else list(extra[name].shape)
        if there == "absent" or not same_size(there, here):
            raise UserError(f"{cfg.adapter} belongs to another base: {name} is {here} by the adapter, {there} in "
                            f"{cfg.model}; give the --model it was trained on")
        w = fp32(extra.get(name, weights[name])).reshape(there)
        if ab:
            r = len(ab["A"])
            w = w + alpha / (math.sqrt(r) if rslora else r) * (fp32(ab["B"]) @ fp32(ab["A"]))
        if not w.isfinite().all():
            raise UserError(f"{name} is NaN or infinite after merging; export.py inspect shows which of {cfg.model} "
                            f"and {cfg.adapter} was so before: take an earlier checkpoint")
        weights[name] = w if cfg.dtype else w.to(weights[name].dtype)  # `cast` goes to cfg.dtype from float32
    ranks = "/".join(sorted({str(len(ab["A"])) for ab in pairs.values()}))
    print(f"{cfg.adapter}: {len(pairs)} matrices of rank {ranks}, alpha {alpha:g}{', rslora' * rslora}; {len(extra)} "
          "tensors replaced")


def add_state(weights, cfg, config):
    """blocks.{i}.att.time_state [H, N, N], one a layer, into `weights`."""
    state, H, N = read_weights(cfg.state), config.n_embd // config.head_size, config.head_size
    wanted = {f"blocks.{i}.att.time_state": [H, N, N] for i in range(config.n_layer)}
    for name in sorted(wanted.keys() | state.keys()):
        there = list(state[name].shape) if name in state else "absent"
        if there != wanted.get(name):
            raise UserError(f"{cfg.state} does not fit {cfg.model}: {name} is {there}, expected "
                            f"{wanted.get(name, 'no such tensor')}; give the --model it was tuned on")
        if not state[name].isfinite().all():
            raise UserError(f"{cfg.state}: {name} has NaN or infinite values; take an earlier checkpoint")
    weights.update(state)
    if config.version == "x070":
        print("warning: the rwkv package silently ignores a state inside an RWKV-7 file; ship the state file beside "
              "the model, and give it to the engine as the initial state", file=sys.stderr)


def merge(cfg):
    check_out(cfg)
    if not cfg.adapter and not cfg.state:
        raise UserError("nothing to merge: give --adapter=LORA or --state=STATE")
    weights = read_weights(cfg.model)
    config = config_of(weights, cfg.model)
    if cfg.adapter:
        add_lora(weights, cfg)
    weights = cast(weights, cfg.dtype)
    if cfg.state:
        add_state(weights, cfg, config)
    write(weights, cfg.out)


# ---------------------------------------------------------------------------------------------------------------------
# convert

@dataclass
class ConvertConfig:
    model: str                   # any file of weights, .pth or .safetensors: a model, a LoRA, a state
    out: str                     # the file to write, .pth or .safetensors
    dtype: Precision = ""        # of what is written; empty = as it is, bit for bit
    overwrite: bool = False      # replace --out if it is there


def convert(cfg):
    check_out(cfg)
    weights, metadata = cast(read_weights(cfg.model), cfg.dtype), metadata_of(cfg.model)
    if metadata.get("alpha") and Path(cfg.out).suffix == ".pth":
        print(f"warning: a .pth cannot carry this LoRA's alpha={metadata['alpha']}, rslora={metadata.get('rslora')}; "
              "write them down, merging it will ask", file=sys.stderr)
    write(weights, cfg.out, metadata or None)


# ---------------------------------------------------------------------------------------------------------------------
# hub: flash-linear-attention's RWKV-7

@dataclass
class HubConfig:
    model: str                   # a model file, to make a folder; or a folder, to make a file
    out: str                     # the folder, or the .pth or .safetensors, to write
    tokenizer: str = ""          # name or file; empty = what the model's folder says, or World if it has 65536 ids
    dtype: Precision = ""        # of what is written; empty = as it is, bit for bit
    shard_gb: float = 5.0        # larger models are cut into files of at most so many GB, with an index
    overwrite: bool = False      # write into --out even if it is there


# what every RWKV-7 has and our network has built in: written to config.json, and demanded of one that is read.
# fla's head norm has eps = head_dim * norm_eps, RWKV's is 64e-5 always: the same for heads of 64 alone.
FIXED = dict(model_type="rwkv7", head_dim=64, hidden_act="sqrelu", norm_first=True, norm_bias=True, norm_eps=1e-5,
             attn=None, tie_word_embeddings=False)
RENAMED = {"emb": "model.embeddings", "ln_out": "model.norm", "head": "lm_head", "ln0": "pre_norm", "ln1": "attn_norm",
           "ln2": "ffn_norm", "att.receptance": "attn.r_proj", "att.key": "attn.k_proj", "att.value": "attn.v_proj",
           "att.output": "attn.o_proj", "att.ln_x": "attn.g_norm"}


def fla_name(name):
    """Official name -> (fla's, transposed?). Low-rank pairs are [in, rank] here, Linear layers [rank, in] there, and
    what is added to them is the second one's bias."""
    layer, rest = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)", name).groups()
    prefix = f"model.layers.{layer}." if layer else ""
    pair = re.fullmatch(r"att\.([wavg])([012])", rest)
    if pair:
        return f"{prefix}attn.{pair[1]}_lora.lora.{['2.bias', '0.weight', '2.weight'][int(pair[2])]}", pair[2] != "0"
    module, _, leaf = rest.rpartition(".")
    return f"{prefix}{RENAMED.get(module, module.replace('att', 'attn'))}.{leaf}", False


def to_fla(weights, config):
    """Official tensors -> fla's names, orientation and shapes: of our [1, 1, C] only att's x_* stay, others are [C]."""
    out = {}
    for name, shape in expected_shapes(config).items():
        if name not in NEVER_TRAINED:
            new, transposed = fla_name(name)
            w = weights[name].reshape(shape)
            out[new] = w.T if transposed else w.flatten() if len(shape) == 3 and ".attn.x_" not in new else w
    return out


def from_fla(theirs, path):
    """fla's tensors -> official ones. Layer 0's v0/v1/v2, which fla has not, as in a fresh model."""
    layers = [int(name.split(".")[2]) for name in theirs if re.match(r"model\.layers\.\d+\.", name)]
    weights = {}
    for name in expected_shapes(RWKVConfig("x070", max(layers, default=0) + 1, 64, 1)):  # names alone: any sizes do
        new, transposed = fla_name(name)
        if new in theirs:
            w = theirs.pop(new)
            weights[name] = w.T if transposed else w
    weights.update(theirs)  # what nothing has asked for is reported by its own name
    config = config_of(weights, path)
    demand_none(problems(weights, config), path, "is it RWKV-7 in fla's present layout?")
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        for name, shape in expected_shapes(config).items():
            if name not in weights:
                weights[name] = init_parameter(name, torch.empty(shape), config).to(weights["blocks.0.att.a0"].dtype)
            weights[name] = weights.pop(name).reshape(shape)  # popped: the official order
    return weights


def read_folder(folder):
    """A hub folder -> official tensors."""
    config, index = Path(folder, "config.json"), Path(folder, "model.safetensors.index.json")
    says = prepare.read_json(config) if config.is_file() else {}
    for key, value in FIXED.items():
        if says.get(key, None if key == "model_type" else value) != value:
            raise UserError(f"{config}: {key} is {says.get(key)!r}, expected {value!r}: a folder of fla's RWKV-7, as "
                            "export.py hub writes it")
    files = sorted(set(prepare.read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    theirs = {}
    for file in files:
        theirs.update(read_weights(Path(folder, file)))
    return from_fla(theirs, folder)


def write_shards(weights, folder, limit):
    """model.safetensors, or model-00001-of-0000n.safetensors of at most `limit` bytes each and their index."""
    shards, size = [{}], 0
    for name, w in weights.items():
        if shards[-1] and size + w.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = w
        size += w.nbytes
    files = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    files = files if len(files) > 1 else ["model.safetensors"]
    where = {name: file for file, shard in zip(files, shards) for name in shard}
    for file, shard in zip(files, shards):
        write(shard, folder / file, {"format": "pt"})  # transformers wants to be told
    if len(files) > 1:
        files.append("model.safetensors.index.json")
        write_json(folder / files[-1], {"metadata": {"total_size": sum(w.nbytes for w in weights.values())},
                                        "weight_map": where})
    for old in folder.glob("model*.safetensors*"):  # of an export into the same folder: it would be read instead
        if old.name not in files:
            old.unlink()


def write_json(path, value):
    with common.atomic_write(path) as tmp:
        tmp.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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


def to_tokenizer_json(tokenizer):
    """Any of prepare's tokenizers as the text of a Hugging Face tokenizer.json with the same ids; 0 is <|endoftext|>.

    Greedy longest match is what the WordPiece model does, here over bytes written as ByteLevel's letters. It is slow on
    long pieces, so the text is cut first, between any two bytes that are neighbours in no token: no match lies over
    such a place, so the ids stay the same. (What is left is slow for runs such as ten thousand dashes.)
    """
    if hasattr(tokenizer, "hub"):
        return tokenizer.text
    end, tokens = "<|endoftext|>", tokenizer.tokens
    if tokenizer.words:
        vocab = {end: 0, **{token.decode(): i for i, token in tokens.items()}}
        hub = tokenizers.Tokenizer(models.WordLevel(vocab, unk_token=""))
        hub.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    else:
        plain = [*range(33, 127), *range(161, 173), *range(174, 256)]  # bytes that ByteLevel keeps; the others move up
        letter = {b: chr(n) for n, b in enumerate((b for b in range(256) if b not in plain), 256)}
        letter.update((b, chr(b)) for b in plain)
        after = {b: "" for b in range(256)}  # which bytes come after b in some token, as \uXXXX
        for b, following in sorted({pair for token in tokens.values() for pair in zip(token, token[1:])}):
            after[b] += f"\\u{ord(letter[following]):04x}"
        cuts = [f"(?<=\\u{ord(letter[b]):04x})" + f"(?=[^{s}])" * bool(s) for b, s in after.items()]
        vocab = {end: 0, **{"".join(letter[b] for b in token): i for i, token in tokens.items()}}
        hub = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="", continuing_subword_prefix="",
                                                    max_input_chars_per_word=10 ** 9))
        hub.pre_tokenizer = pre_tokenizers.Sequence([
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
            pre_tokenizers.Split(Regex("|".join(cuts)), "removed")])
        hub.decoder = decoders.ByteLevel()
    hub.add_special_tokens([AddedToken(end, special=True, normalized=False)])
    return hub.to_str()


def hub(cfg):
    if Path(cfg.model).is_dir():  # back
        check_out(cfg)
        return write(cast(read_folder(cfg.model), cfg.dtype), cfg.out)
    check_out(cfg, "folder")
    weights = read_weights(cfg.model)
    c = config_of(weights, cfg.model)
    if c.version == "x060":
        raise UserError(f"{cfg.model} is RWKV-6, hub writes RWKV-7: fla's RWKV-6 normalises heads with eps 1e-5, not "
                        "64e-5, so it would compute something else; use export.py convert")
    if c.head_size != FIXED["head_dim"]:
        raise UserError(f"{cfg.model} has heads of {c.head_size}; fla's RWKV-7 computes the same for heads of 64 alone")
    demand_none(problems(weights, c), cfg.model, "fla has a place for a model's own tensors only")
    folder, beside = Path(cfg.out), Path(cfg.model).parent  # a run's folder names its tokenizer
    world = c.vocab_size == 65536 and not (beside / "config.json").is_file()
    tokenizer = prepare.load_tokenizer(cfg.tokenizer or ("world" if world else beside))
    if tokenizer.vocab_size > c.vocab_size:
        raise UserError(f"the tokenizer has {tokenizer.vocab_size} ids, {cfg.model} only {c.vocab_size}; give the "
                        "--tokenizer that it was trained with")
    tokenizer_json = to_tokenizer_json(tokenizer)
    end = tokenizers.Tokenizer.from_str(tokenizer_json).id_to_token(tokenizer.end_id)
    weights = to_fla(cast(weights, cfg.dtype), c)
    write_shards(weights, folder, cfg.shard_gb * 1e9)
    with common.atomic_write(folder / "tokenizer.json") as tmp:
        tmp.write_text(tokenizer_json, encoding="utf-8")
    write_json(folder / "tokenizer_config.json", dict(
        tokenizer_class="PreTrainedTokenizerFast", bos_token=end, eos_token=end, pad_token=end,
        clean_up_tokenization_spaces=False, chat_template=CHAT_TEMPLATE))
    special = dict(bos_token_id=tokenizer.end_id, eos_token_id=tokenizer.end_id)
    # top_k = 0: transformers' own default of 50 would not be the model's distribution
    write_json(folder / "generation_config.json", dict(**special, pad_token_id=tokenizer.end_id, do_sample=True,
                                                       temperature=1.0, top_p=1.0, top_k=0))
    # no pad_token_id here: fla would hand it to the embedding as padding_idx, and that row would stop learning
    write_json(folder / "config.json", dict(
        architectures=["RWKV7ForCausalLM"], **FIXED, **special, attn_mode="chunk", hidden_size=c.n_embd,
        num_hidden_layers=c.n_layer, num_heads=c.n_embd // c.head_size, value_dim=[c.n_embd] * c.n_layer,
        intermediate_size=c.dim_ffn, hidden_ratio=c.dim_ffn / c.n_embd, vocab_size=c.vocab_size,
        decay_low_rank_dim=c.decay_rank, a_low_rank_dim=c.iclr_rank, v_low_rank_dim=c.value_rank,
        gate_low_rank_dim=c.gate_rank, use_cache=True, torch_dtype=str(weights["model.embeddings.weight"].dtype)[6:]))
    print(f"{folder}: RWKV7ForCausalLM, {c.n_layer} layers of width {c.n_embd}, tokenizer {tokenizer.name}")


# ---------------------------------------------------------------------------------------------------------------------
# inspect

@dataclass
class InspectConfig:
    file: tyro.conf.Positional[str]  # .pth or .safetensors: a model, a LoRA, a state; a run's last.pt; a hub folder


def describe(path):
    """-> (lines on what the file is, lines on what is odd about it)"""
    if Path(path).is_dir():
        weights, size = read_folder(path), sum(f.stat().st_size for f in Path(path).glob("*.safetensors"))
    else:
        weights = read_weights(path) if Path(path).suffix == ".safetensors" else common.load_torch(path)
        size = Path(path).stat().st_size
    if not isinstance(weights, dict) or not all(isinstance(w, torch.Tensor) for w in weights.values()):
        if not isinstance(weights, dict) or "optimizer" not in weights:
            return [f"{path}: a PyTorch file of {megabytes(size)}"], ["no flat dict of tensors, so no weights"]
        return [f"{path}: a run's checkpoint at step {weights.get('step')}, {megabytes(size)}: {', '.join(weights)}"], [
            "for --resume alone; the weights are in the numbered files beside it"]
    odd = [f"{name} has {n} values that are NaN or infinite" for name, w in weights.items()
           if (n := int((~w.isfinite()).sum()))]
    total = f"{sum(w.numel() for w in weights.values()):,} parameters, {dtypes(weights)}, {megabytes(size)}"
    pairs, extra = split_adapter(weights)
    if pairs:
        says, kinds = metadata_of(path), sorted({re.sub(r"blocks\.\d+\.", "", name) for name in pairs})
        ranks = "/".join(sorted({str(len(ab["A"])) for ab in pairs.values() if "A" in ab}))
        odd += [f"{name} has lora_{list(ab)[0]} alone" for name, ab in pairs.items() if len(ab) != 2]
        odd += [] if "alpha" in says else ["does not say its alpha; export.py merge will ask for it"]
        return [f"{path}: a LoRA of rank {ranks}, alpha {says.get('alpha', '?')}, rslora {says.get('rslora', '?')}",
                f"{len(pairs)} matrices ({', '.join(kinds)}), {len(extra)} extra tensors", total], odd
    states = [name for name in weights if ".time_sta" in name]
    if states and len(states) == len(weights):
        return [f"{path}: a tuned state of {len(states)} layers, each {list(weights[states[0]].shape)}", total], odd
    c = config_of(weights, path)
    v7, expected = c.version == "x070", expected_shapes(c)
    ranks = (f"in-context rate {c.iclr_rank}, value {c.value_rank}, gate {c.gate_rank}" if v7 else f"mix {c.mix_rank}")
    lines = [f"{path}: RWKV-{c.version[2]} ({c.version}), {c.n_layer} layers, width {c.n_embd}, "
             f"{c.n_embd // c.head_size} heads of {c.head_size}",
             f"FFN {c.dim_ffn}, vocabulary {c.vocab_size}, ranks: decay {c.decay_rank}, {ranks}", total]
    absent = [name for name in NEVER_TRAINED if v7 and name not in weights]
    if absent:
        odd.append(f"without {', '.join(absent)}; they are never used, and most loaders do without")
    if states:
        odd.append(f"a tuned state of {len(states)} layers is inside" + "; the rwkv package silently ignores it" * v7)
    squeezed = [name for name, w in weights.items() if w.dim() == 1 and len(expected.get(name, ())) == 3]
    if squeezed:
        odd.append(f"{len(squeezed)} vectors are [C] ({squeezed[0]} …); RWKV-LM's trainer wants [1, 1, C]")
    if len({w.dtype for w in weights.values()}) > 1:
        odd.append("mixed dtypes; export.py convert --dtype=… makes them one")
    if "score.weight" in weights:
        odd.append("a score head: this is a reward model")
    wrong = [p for p in problems(weights, c) if ".time_sta" not in p and not p.startswith("score.weight")]
    return lines, odd + wrong[:20] + [f"… and {len(wrong) - 20} more"] * (len(wrong) > 20)


def inspect(cfg):
    lines, odd = describe(cfg.file)
    print("\n".join([*lines, *(f"odd: {line}" for line in odd)] if odd else [*lines, "nothing odd"]))


# ---------------------------------------------------------------------------------------------------------------------

COMMANDS = {"merge": (MergeConfig, merge), "convert": (ConvertConfig, convert), "hub": (HubConfig, hub),
            "inspect": (InspectConfig, inspect)}


def main(argv=None):
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] in ("-h", "--help"):
        return print(__doc__)
    if argv[0] not in COMMANDS:
        sys.exit(f"error: {argv[0]} is not a command of export.py; expected one of {', '.join(COMMANDS)}")
    config, command = COMMANDS[argv[0]]
    command(common.read_flags(config, argv[1:]))


if __name__ == "__main__":
    main()
