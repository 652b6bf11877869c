"""Files in Hugging Face's forms: shards, fla's RWKV-7 (flash-linear-attention), RWKV-6 as it is
published there, PEFT's adapters.

read_weights of gosling/weights.py reads them through this; export.py writes them.
"""

import re
from pathlib import Path

from gosling.config import UserError
from gosling.files import read_json
from gosling.schemas import Adapter
from model import NEVER_TRAINED, RWKV, RWKVConfig

import torch

# model-00001-of-00002.safetensors
SHARD = re.compile(r"(.+-)(\d+)(-of-)(\d+)(\.safetensors|\.bin)")
IN_FOLDERS = ("model.safetensors", "adapter_model.safetensors", "adapter_model.bin")
IN_FOLDERS += ("pytorch_model.bin", "model.safetensors.index.json", "pytorch_model.bin.index.json")
IN_FOLDERS += ("model.pth",)  # rwkvtune's


def files_of(path):
    """The files that hold the tensors of a file, of a folder, or of all that a shard belongs to."""
    path = in_folder(Path(path)) if Path(path).is_dir() else Path(path)
    shard = SHARD.fullmatch(path.name)
    if path.name.endswith(".index.json"):
        names = names_in(path)
    elif shard:
        start, _, of, n, suffix = shard.groups()
        names = [f"{start}{number:0{len(n)}}{of}{n}{suffix}" for number in range(1, int(n) + 1)]
    else:
        return [path]
    files = [path.with_name(name) for name in names]
    for file in files:
        if not file.is_file():
            raise UserError(
                f"{file} does not exist; the weights lie in {len(files)} files, give them all"
            )
    return files


def names_in(index):
    """The names of the shards that an index, *.index.json, lists."""
    if not index.is_file():
        raise UserError(f"{index} does not exist")
    listed = read_json(index)
    shards = listed.get("weight_map") if isinstance(listed, dict) else None
    if not shards or not isinstance(shards, dict):
        raise UserError(f"{index} has no weight_map, which lists the shards")
    return sorted({str(name) for name in shards.values()})


def in_folder(folder):
    """The file of a Hugging Face folder that holds the tensors, or its index, or a first shard."""
    shards = sorted(file for file in folder.iterdir() if SHARD.fullmatch(file.name))
    for file in [*(folder / name for name in IN_FOLDERS), *shards]:
        if file.is_file():
            return file
    found = sorted(file for file in folder.iterdir() if file.suffix in (".pth", ".safetensors"))
    names = ", ".join(str(file) for file in found[:4]) or "there is none in it"
    raise UserError(f"{folder} is a folder without model.safetensors; give a file of it: {names}")


def folder_of(path):
    """The folder that a file lies in; a folder itself."""
    return Path(path) if Path(path).is_dir() else Path(path).parent


def official(weights, path):
    """{name: tensor} of a file -> the same under our names: fla's RWKV-7, RWKV-6 and PEFT's
    adapters.

    Weights that are none of these are given back as they are.
    """
    if any(name.startswith("model.layers.") for name in weights):
        return from_fla(weights, folder_of(path) / "config.json")
    if any(name.startswith("rwkv.blocks.") for name in weights):
        return from_six(weights, folder_of(path) / "config.json")
    if any(name.startswith("base_model.model.") for name in weights):
        return from_peft(weights)
    return weights


# ----------------------------------------------------------------------------------------------
# flash-linear-attention's RWKV-7

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


def from_fla(theirs, config_file):
    """{fla's name: tensor}, which is emptied -> {official name: tensor}, vectors as [1, 1, C].

    What has no official name keeps its own. UserError where config.json is of another network.
    """
    config = settings_of(config_file, FIXED, "fla's RWKV-7")
    weights, zeros = {}, never_used(theirs, config)
    for name, n_dims in official_names(theirs).items():
        new_name, transposed = fla_name(name)
        if new_name in theirs:
            w = theirs.pop(new_name)
            is_flat = w.dim() == 1 and n_dims == 3
            w = w.reshape(1, 1, -1) if is_flat else w
            weights[name] = w.T.contiguous() if transposed else w
        elif name in zeros:
            weights[name] = zeros[name]
    return weights | theirs


def never_used(theirs, config):
    """{official name: zeros} of layer 0's v0, v1, v2, which fla leaves out, no engine reads, and
    RWKV-LM's trainer wants; {} of a file that is not whole.

    Upstream begins with others, random ones in v2; they could not be repeated.
    """
    emb = theirs.get("model.embeddings.weight", torch.empty(0))
    down = theirs.get("model.layers.1.attn.v_lora.lora.0.weight")  # [rank, C]
    rank = config.get("v_low_rank_dim") if down is None else down.shape[:1].numel()
    if emb.dim() != 2 or not isinstance(rank, int) or not 0 < rank < 2**16:
        return {}
    C = emb.shape[1]
    shapes = (1, 1, C), (C, rank), (rank, C)
    return {name: emb.new_zeros(s) for name, s in zip(NEVER_TRAINED, shapes, strict=True)}


def settings_of(config_file, fixed, what):
    """config.json of a folder of `what`; UserError unless its settings are the `fixed` ones."""
    config = read_json(config_file)
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise UserError(
                f"{config_file}: {key} is {config.get(key)!r:.60}, expected {value!r}: "
                f"a folder of {what}, as export.py hub writes it"
            )
    return config


def official_names(theirs):
    """{official name: dimensions of the tensor} of an RWKV-7 that has the layers of `theirs`,
    fla's names."""
    found = [re.match(r"model\.layers\.(\d{1,3})\.", name) for name in theirs]
    last = max((int(match[1]) for match in found if match), default=0)
    with torch.device("meta"):
        any_sizes = RWKV(RWKVConfig("x070", last + 1, 64, 1))
    return {name: p.dim() for name, p in any_sizes.named_parameters()}


def cache_tensors(state):
    """A state [L, 1, ...] -> {name: tensor}, as transformers' caches of RWKV-7 hold each layer.

    recurrent_state [1, H, key, value] is turned, and fla calls attention_shift conv_state.
    """
    tensors = {}
    for i, wkv in enumerate(state["wkv"]):  # [1, H, value, key]
        tensors[f"layers.{i}.recurrent_state"] = wkv.float().mT.contiguous()
        tensors[f"layers.{i}.attention_shift"] = state["att_shift"][i].float().clone()  # [1, C]
        tensors[f"layers.{i}.ffn_shift"] = state["ffn_shift"][i].float().clone()
    return tensors


# ----------------------------------------------------------------------------------------------
# RWKV-6 as it is published at Hugging Face, and as llama.cpp's converter reads it

# As FIXED. The eps of the head norm is 1e-5 * head_size_divisor ** 2, for heads of any size.
FIXED_SIX = dict(
    model_type="rwkv6", layer_norm_epsilon=1e-5, head_size_divisor=8, tie_word_embeddings=False
)
RENAMED_SIX = {"emb": "embeddings", "ln0": "pre_ln", "att": "attention", "ffn": "feed_forward"}


def six_name(name):
    """Official name -> the one there: rwkv.blocks.0.attention.key.weight; tensors are the same."""
    parts = [RENAMED_SIX.get(part, part) for part in name.split(".")]
    return ".".join(parts if parts[0] == "head" else ["rwkv", *parts])


def from_six(theirs, config_file):
    """{name there: tensor} -> {official name: tensor}. UserError as from_fla."""
    settings_of(config_file, FIXED_SIX, "RWKV-6")
    back, weights = {new: old for old, new in RENAMED_SIX.items()}, {}
    for name, w in theirs.items():
        parts = [back.get(part, part) for part in name.removeprefix("rwkv.").split(".")]
        weights[".".join(parts)] = w
    return weights


# ----------------------------------------------------------------------------------------------
# PEFT's adapters, as RWKV-PEFT saves them


def from_peft(theirs):
    """{PEFT's name: tensor} of an adapter -> {official name: tensor}, fla's names included."""
    weights = {peft_name(name): w for name, w in theirs.items()}
    if not any(name.startswith("model.layers.") for name in weights):
        return weights
    modules = {}
    for name in official_names(weights):
        modules[fla_name(name)[0].rpartition(".")[0]] = name.rpartition(".")[0]
    renamed = {}
    for name, w in weights.items():
        module, _, leaf = name.rpartition(".")
        renamed[f"{modules.get(module, module)}.{leaf}"] = w
    return renamed


def peft_name(name):
    """base_model.model.blocks.0.att.key.lora_A.weight -> blocks.0.att.key.lora_A"""
    name = name.removeprefix("base_model.model.")
    return re.sub(r"\.(lora_[AB])(\.default)?\.weight$", r".\1", name)


def peft_settings(path):
    """What adapter_config.json in the folder of an adapter says: {str: str}; {} if there is none.

    UserError for a kind of adapter that W + scale B A is not.
    """
    file = folder_of(path) / "adapter_config.json"
    config = read_json(file, Adapter)
    if not config:
        return {}
    start = config.get("init_lora_weights", True)
    other_base = isinstance(start, str) and start not in ("true", "gaussian", "orthogonal", "eva")
    refused = {
        "peft_type": config.get("peft_type", "LORA") != "LORA",
        "use_dora": config.get("use_dora"),
        "use_qalora": config.get("use_qalora"),
        "alpha_pattern": config.get("alpha_pattern"),
        "init_lora_weights": other_base,  # PiSSA and its like change the base, too
    }
    for key, is_refused in refused.items():
        if is_refused:
            raise UserError(
                f"{file}: {key} is {config[key]!r:.60}, which is not read; merge it with PEFT's "
                "own merge_and_unload, and give that file"
            )
    about = {"alpha": config.get("lora_alpha"), "rslora": bool(config.get("use_rslora"))}
    about["model"] = config.get("base_model_name_or_path")
    return {key: str(value) for key, value in about.items() if value is not None}


def to_peft(weights, about, path, is_for_hub):
    """A LoRA's {name: tensor} -> ({PEFT's name: tensor}, what adapter_config.json says).

    about: read_metadata of `path`. is_for_hub: the model it goes on has fla's names, as a hub
    folder's has. UserError for what PEFT's own loader would lose.
    """
    matrices = [name.removesuffix(".lora_A") for name in weights if name.endswith(".lora_A")]
    if not matrices:
        raise UserError(f"{path} is not a LoRA, it has no lora_A; --to=peft is for a LoRA")
    if "alpha" not in about:
        raise UserError(
            f"{path} does not say its alpha, which adapter_config.json must; merge it with "
            "export.py merge --alpha=…, or give the .safetensors that training wrote"
        )
    alpha, ranks = float(about["alpha"]), {len(weights[f"{m}.lora_A"]) for m in matrices}
    if len(ranks) > 1:
        raise UserError(
            f"{path} has ranks {sorted(ranks)}, expected one for all matrices; merge it"
        )
    of_six = [m for m in matrices if m.endswith(("att.gate", "ffn.receptance"))]
    if is_for_hub and of_six:
        raise UserError(f"{path} is of an RWKV-6 ({of_six[0]}); --to=peft-hub is for RWKV-7")
    theirs, lora_modules, whole_modules = {}, set(), set()
    for name, w in weights.items():
        module, _, leaf = name.rpartition(".")
        is_lora = leaf in ("lora_A", "lora_B")
        if not is_lora:
            check_whole_module(name, matrices, path)
        if is_for_hub:
            module = fla_name(f"{module}.weight")[0].removesuffix(".weight")
        (lora_modules if is_lora else whole_modules).add(module)
        end = ".weight" if is_lora else ""
        theirs[f"base_model.model.{module}.{leaf}{end}"] = w
    config = dict(
        peft_type="LORA",
        task_type=None,
        base_model_name_or_path=about.get("model"),
        r=ranks.pop(),
        lora_alpha=int(alpha) if alpha.is_integer() else alpha,
        use_rslora=about.get("rslora") == "True",
        lora_dropout=float(about.get("dropout", 0)),
        target_modules=sorted(lora_modules),
        modules_to_save=sorted(whole_modules) or None,
        bias="none",
        init_lora_weights=True,
        inference_mode=True,
    )
    return theirs, config


def check_whole_module(name, matrices, path):
    """UserError unless a parameter that was trained as it is belongs to a module PEFT can save."""
    module, _, leaf = name.rpartition(".")
    if leaf not in ("weight", "bias") or module in matrices or name == "score.weight":
        raise UserError(
            f"{path}: PEFT cannot hold {name}, which is trained beside the LoRA; it holds whole "
            "modules, such as a norm or the embedding; merge it (export.py merge)"
        )
