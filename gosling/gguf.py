"""GGUF, the file of llama.cpp: a whole RWKV-6 or 7 with its tokenizer and chat template.

export.py gguf writes it, with the package of the same name: pip install gguf.
"""

import json
import re

from gosling.config import UserError
from gosling.files import atomic_write
from gosling.hub_folder import CHAT_TEMPLATE
from gosling.tokenizer import END_TOKEN
from model import NEVER_TRAINED

import torch

FILE_TYPES = {"float32": 0, "float16": 1, "bfloat16": 32}  # general.file_type of llama.cpp

# What is not att.X -> time_mix_X or ffn.X -> channel_mix_X.
RENAMED = {
    "emb": "token_embd",
    "ln0": "token_embd_norm",
    "ln_out": "output_norm",
    "head": "output",
    "ln1": "attn_norm",
    "ln2": "attn_norm_2",
    "att.ln_x": "time_mix_ln",
    "ffn.x_k": "channel_mix_lerp_k",
    "ffn.time_maa_k": "channel_mix_lerp_k",
    "ffn.time_maa_r": "channel_mix_lerp_r",
    "att.time_maa_x": "time_mix_lerp_x",
    "att.time_maa_w1": "time_mix_w1",
    "att.time_maa_w2": "time_mix_w2",
    "att.time_decay": "time_mix_decay",
    "att.time_decay_w1": "time_mix_decay_w1",
    "att.time_decay_w2": "time_mix_decay_w2",
    "att.time_faaaa": "time_mix_first",
}
# The weights of a token's mix with the one before it, in the order in which they lie in one tensor.
MIXED = {
    "x070": [f"x_{x}" for x in "rwkvag"],
    "x060": [f"time_maa_{x}" for x in "wkvrg"],
}
# [in, rank] and [rank, in] here, the other way round there.
TRANSPOSED = re.compile(r"att\.([wavg][12]|time_maa_w[12]|time_decay_w[12])")
# float32 in every file, as llama.cpp's own converter keeps them; vectors are, too.
ALWAYS_FLOAT32 = re.compile(r".*\.time_mix_(first|w1|w2|decay_w1|decay_w2|lerp_fused)\.weight")


def gguf_package():
    """The package, which is an extra; UserError if it is not installed."""
    try:
        import gguf
    except ImportError as e:
        raise UserError(
            f"export.py gguf needs the package gguf ({e}); install it: pip install gguf"
        ) from e
    return gguf


def write_gguf(weights, config, tokenizer, dtype, out):
    """{official name: tensor of the network's shape}, which is emptied, as `out` -> how many
    tensors the file has.

    dtype: float32, float16 or bfloat16, of the matrices; see ALWAYS_FLOAT32. A tokenizer that
    llama.cpp has no form for is a UserError.
    """
    gguf = gguf_package()
    with atomic_write(out) as tmp:
        writer = gguf.GGUFWriter(tmp, "rwkv7" if config.version == "x070" else "rwkv6")
        write_sizes(writer, config)
        writer.add_file_type(FILE_TYPES[dtype])
        write_tokenizer(writer, gguf.TokenType, tokenizer, config.vocab_size)
        n_tensors = 0
        for name, w in gguf_tensors(weights, config):
            keep = w.dim() == 1 or ALWAYS_FLOAT32.fullmatch(name)
            write_tensor(writer, gguf, name, w, "float32" if keep else dtype)
            n_tensors += 1
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return n_tensors


def write_sizes(writer, config):
    writer.add_context_length(2**20)  # RWKV has no limit; llama.cpp wants a number
    writer.add_embedding_length(config.n_embd)
    writer.add_block_count(config.n_layer)
    writer.add_feed_forward_length(config.dim_ffn)
    writer.add_layer_norm_eps(1e-5)
    writer.add_wkv_head_size(config.head_size)
    writer.add_head_count(0)  # of attention; llama.cpp wants the key
    if config.version == "x070":
        writer.add_decay_lora_rank(config.decay_rank)
        writer.add_iclr_lora_rank(config.iclr_rank)
        writer.add_value_residual_mix_lora_rank(config.value_rank)
        writer.add_gate_lora_rank(config.gate_rank)
    else:
        writer.add_time_mix_extra_dim(config.mix_rank)
        writer.add_time_decay_extra_dim(config.decay_rank)
        writer.add_rescale_every_n_layers(0)  # the weights are as trained


# ----------------------------------------------------------------------------------------------
# tensors


def gguf_name(name):
    """Official name -> llama.cpp's: blocks.1.att.key.weight -> blk.1.time_mix_key.weight"""
    layer, rest = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)", name).groups()
    module, _, leaf = rest.rpartition(".")
    if leaf not in ("weight", "bias"):  # a parameter of its own, as att.w0
        module, leaf = rest, "weight"
    renamed = module.replace("att.", "time_mix_").replace("ffn.", "channel_mix_")
    renamed = RENAMED.get(module, renamed)
    prefix = f"blk.{layer}." if layer and module != "ln0" else ""
    return f"{prefix}{renamed}.{leaf}"


def gguf_tensors(weights, config):
    """Yield (llama.cpp's name, tensor) of each; `weights` is emptied on the way."""
    order = MIXED[config.version]
    for name in list(weights):
        if name not in weights or name in NEVER_TRAINED:
            continue  # taken with another one, or of no use
        w = weights.pop(name)
        part = re.sub(r"blocks\.\d+\.", "", name)
        layer, leaf = name.removesuffix(part), part.removeprefix("att.")
        if part.startswith("att.") and leaf in order:
            weights[name] = w
            mixed = [weights.pop(f"{layer}att.{x}").reshape(1, 1, -1) for x in order]
            yield gguf_name(f"{layer}att.lerp_fused"), torch.stack(mixed)  # [6 or 5, 1, 1, C]
            continue
        if TRANSPOSED.fullmatch(part):
            w = w.mT  # [rank, in], time_maa_w2 [5, C, rank]
        elif part == "att.r_k" or w.dim() == 3:  # [H, N]; a vector [1, 1, C]
            w = w.flatten()
        yield gguf_name(name), w
        if config.version == "x070" and re.fullmatch(r"blocks\.0\.att\.a[012]", name):
            # llama.cpp wants v0, v1, v2 in layer 0, too, as large as these, and never uses them.
            yield gguf_name(name.replace("att.a", "att.v")), w


def write_tensor(writer, gguf, name, w, dtype):
    """Add a tensor as `dtype`; UserError if that cannot hold its numbers."""
    w = w.to(getattr(torch, dtype)).contiguous()
    if not w.isfinite().all():
        raise UserError(f"{name} would be NaN or infinite as {dtype}, which cannot hold it")
    if dtype == "bfloat16":  # numpy has none, its bytes are handed over
        bytes_of_it = w.view(torch.uint8).numpy()
        writer.add_tensor(name, bytes_of_it, raw_dtype=gguf.GGMLQuantizationType.BF16)
    else:
        writer.add_tensor(name, w.numpy())


# ----------------------------------------------------------------------------------------------
# the tokenizer


def write_tokenizer(writer, kinds, tokenizer, vocab_size):
    """Tokens, what each is for, merges, and the chat template. kinds: gguf's TokenType."""
    if hasattr(tokenizer, "hub"):
        tokens = write_bpe(writer, kinds, tokenizer, vocab_size)
    else:
        tokens = write_vocabulary(writer, kinds, tokenizer, vocab_size)
    writer.add_token_list([token.encode() for token in tokens])
    writer.add_bos_token_id(tokenizer.end_id)
    writer.add_eos_token_id(tokenizer.end_id)
    writer.add_add_bos_token(False)
    writer.add_chat_template(CHAT_TEMPLATE)
    try:
        blank_line = tokenizer.encode("\n\n")
    except UserError:  # no token holds it
        blank_line = []
    if len(blank_line) == 1:  # as with llama.cpp's own converter, it ends a turn
        writer.add_eot_token_id(blank_line[0])


def unused(i):
    """The text that stands for an id without a token; it must not be empty, nor there twice."""
    return f"[PAD{i}]"


def write_vocabulary(writer, kinds, tokenizer, vocab_size):
    """World's kind, {id: bytes} -> tokens as the literals that llama.cpp reads."""
    if tokenizer.words:
        raise UserError(
            f"tokenizer {tokenizer.name} cuts at white space, and llama.cpp has none that does; "
            "give a model with World, bytes, a BPE or a vocab file"
        )
    for token in tokenizer.tokens.values():
        if token[:1] not in tokenizer.ids:
            # llama.cpp never ends on a text that begins like a token and is none
            raise UserError(
                f"tokenizer {tokenizer.name} has the token {token!r:.60}, but none for its first "
                "byte alone, and llama.cpp's tokenizer wants one; use a vocab file that has it"
            )
    tokens, types = [END_TOKEN], [kinds.CONTROL]
    for i in range(1, vocab_size):
        is_token = i in tokenizer.tokens
        tokens.append(repr(tokenizer.tokens[i])[2:-1] if is_token else unused(i))
        types.append(kinds.NORMAL if is_token else kinds.UNUSED)
    writer.add_tokenizer_model("rwkv")
    writer.add_token_types(types)
    return tokens


def write_bpe(writer, kinds, tokenizer, vocab_size):
    """A byte-level BPE -> its tokens as the tokenizer.json has them."""
    file = json.loads(tokenizer.text)
    problem = unlike_gpt2(file)
    if problem:
        raise UserError(
            f"{tokenizer.name}: {problem}; of tokenizer.json files, export.py gguf takes a "
            "byte-level BPE that cuts words as GPT-2 does, as prepare.py --tokenizer=bpe:SIZE "
            "makes it"
        )
    token_of = {i: token for token, i in tokenizer.hub.get_vocab(with_added_tokens=True).items()}
    added = {token["content"]: token["special"] for token in file["added_tokens"]}
    tokens = [token_of.get(i, unused(i)) for i in range(vocab_size)]
    types = []
    for i, token in enumerate(tokens):
        if i not in token_of:
            types.append(kinds.UNUSED)
        elif token in added:
            types.append(kinds.CONTROL if added[token] else kinds.USER_DEFINED)
        else:
            types.append(kinds.NORMAL)
    merges = file["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    return tokens


def unlike_gpt2(file):
    """What a tokenizer.json has that llama.cpp's "gpt-2" has not, in words; "" if nothing."""
    model, cut = file["model"], file.get("pre_tokenizer") or {}
    if model.get("type") != "BPE":
        return f"model.type is {model.get('type')!r}, expected 'BPE'"
    if not model["merges"]:
        return "it has no merges, and llama.cpp reads none without"
    for key in ("continuing_subword_prefix", "end_of_word_suffix", "ignore_merges", "dropout"):
        if model.get(key):
            return f"model.{key} is {model[key]!r:.40}, expected none"
    if file.get("normalizer"):
        return f"it has a normalizer, {file['normalizer'].get('type')!r:.40}, expected none"
    if cut.get("type") != "ByteLevel" or cut.get("add_prefix_space") or not cut.get("use_regex"):
        return f"pre_tokenizer is {json.dumps(cut):.120}, expected ByteLevel with use_regex"
    return ""
