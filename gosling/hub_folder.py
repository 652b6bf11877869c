"""What lies in the folders that export.py hub writes: RWKV-7 as flash-linear-attention has it, with
a model of transformers' own beside it (gosling/hub_model.py); RWKV-6; rwkvtune's folder."""

from pathlib import Path

from gosling.config import UserError
from gosling.files import atomic_write
from gosling.hub import FIXED, FIXED_SIX, fla_name, six_name
from gosling.tokenizer import END_TOKEN
from gosling.vocab_json import tokenizer_json
from model import NEVER_TRAINED

# What prepare.render_chat writes: blank lines only between turns, none inside them; the end token
# after a last reply. tokenizer.apply_chat_template(..., enable_thinking=True or False) begins a
# reply with one of G1's prefixes.
CHAT_TEMPLATE = r"""{%- for message in messages %}
    {%- set lines = message['content'].replace('\r', '\n').strip('\n').rstrip().split('\n') %}
    {%- set text = lines | select | join('\n') %}
    {%- set is_indented = text.split('\n')[0].strip() and (text[:2] == '  ' or text[:1] == '\t') %}
    {%- set is_code = is_indented and ('\n ' in text or '\n\t' in text) %}
    {%- if message['role'] != 'assistant' or not is_code %}{% set text = text.lstrip() %}{% endif %}
    {%- if message['role'] not in ['system', 'user', 'assistant'] %}
        {{- raise_exception('a role is system, user or assistant, not ' + message['role']) }}
    {%- endif %}
    {{- ((message['role'] | capitalize) + ': ' + text).rstrip() }}
    {%- if not loop.last or add_generation_prompt %}{{ '\n\n' }}
    {%- elif message['role'] == 'assistant' %}{{ eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{ 'Assistant:' }}
    {%- if enable_thinking is defined %}
        {{- ' <think' if enable_thinking else ' <think>\n</think' }}
    {%- endif %}
{%- endif %}
"""


VOCAB_OF_ENGINES = "rwkv_vocab_v20230424.txt"  # what llama.cpp's converter and rwkvtune read
MODEL_FILE = "modeling_rwkv7.py"  # what gosling/hub_model.py is called in a folder
# Not in every folder: an engine would take one that is left from an older export.
NOT_ALWAYS = ("tokenizer.json", "vocab.txt", VOCAB_OF_ENGINES)
NOT_ALWAYS += ("model.pth", "model.safetensors", MODEL_FILE)


def remove_older(folder):
    for name in NOT_ALWAYS:
        (folder / name).unlink(missing_ok=True)


def write_model(folder):
    """The file with which transformers computes an RWKV-7, see auto_map in config.json."""
    text = Path(__file__).with_name("hub_model.py").read_text(encoding="utf-8")
    write_text(folder / MODEL_FILE, text)


def hub_tensors(weights, version):
    """{official name: tensor}, which is emptied -> {name in a hub folder: tensor as it is there}"""
    theirs = {}
    for name in list(weights):
        w = weights.pop(name)
        if version == "x060":
            theirs[six_name(name)] = w
            continue
        if name in NEVER_TRAINED:
            continue
        new_name, transposed = fla_name(name)
        if transposed:
            w = w.T
        elif w.dim() == 3 and ".attn.x_" not in new_name:  # these alone stay [1, 1, C]
            w = w.flatten()
        theirs[new_name] = w
    return theirs


def write_tokenizer(tokenizer, folder):
    """Every file of a folder that has the tokenizer, but its settings -> why transformers does not
    read it, or "".

    A tokenizer.json goes along as it is. Of any other, there is the vocab file, which is the
    tokenizer; a tokenizer.json made of it; and a copy under the name that other engines look for.
    """
    if hasattr(tokenizer, "hub"):
        tokenizer.save(folder)
        return ""
    tokenizer.text = tokenizer.text or vocab_text(tokenizer)
    tokenizer.save(folder)
    # llama.cpp's converter counts the lines and takes them for the ids.
    is_counted = list(tokenizer.tokens) == list(range(1, len(tokenizer.tokens) + 1))
    if is_counted and not tokenizer.words:
        write_text(folder / VOCAB_OF_ENGINES, vocab_text(tokenizer))
    text, why_none = tokenizer_json(tokenizer)
    if text:
        write_text(folder / "tokenizer.json", text)
    return why_none


def write_text(path, text):
    with atomic_write(path) as tmp:
        tmp.write_bytes(text.encode())


def vocab_text(tokenizer):
    """The vocab file of {id: bytes}: World's `id literal bytelength`, of words a list."""
    if tokenizer.words:
        lines = [token.decode() for token in tokenizer.tokens.values()]
    else:
        lines = [f"{i} {token!r} {len(token)}" for i, token in tokenizer.tokens.items()]
    return "".join(line + "\n" for line in lines)


def hub_settings(config, dtype, tokenizer):
    """{file: value} of a hub folder's JSON files."""
    end_id, end_token, made_from = tokenizer.end_id, END_TOKEN, dict(made_from="vocab.txt")
    if hasattr(tokenizer, "hub"):
        end_token, made_from = tokenizer.hub.id_to_token(end_id), {}
    ids = dict(bos_token_id=end_id, eos_token_id=end_id)
    tokenizer_settings = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        padding_side="left",  # a batch of prompts ends where the answers begin
        **made_from,  # see file_in of gosling/tokenizer.py
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
    sizes = dict(
        hidden_size=config.n_embd,
        num_hidden_layers=config.n_layer,
        intermediate_size=config.dim_ffn,
        vocab_size=config.vocab_size,
        use_cache=True,
        torch_dtype=dtype,
    )
    network = settings_of_seven(config) if config.version == "x070" else settings_of_six(config)
    return {
        "tokenizer_config.json": tokenizer_settings,
        "generation_config.json": {**ids, **sampling},
        "config.json": {**network, **ids, **sizes},
    }


def settings_of_seven(config):
    """What config.json says of an RWKV-7, as fla's class and gosling/hub_model.py's read it."""
    module = MODEL_FILE.removesuffix(".py")
    return dict(
        architectures=["RWKV7ForCausalLM"],
        auto_map={
            "AutoConfig": f"{module}.RWKV7Config",
            "AutoModelForCausalLM": f"{module}.RWKV7ForCausalLM",
        },
        **FIXED,
        attn_mode="chunk",
        num_heads=config.n_embd // config.head_size,
        value_dim=[config.n_embd] * config.n_layer,
        hidden_ratio=config.dim_ffn / config.n_embd,
        decay_low_rank_dim=config.decay_rank,
        a_low_rank_dim=config.iclr_rank,
        v_low_rank_dim=config.value_rank,
        gate_low_rank_dim=config.gate_rank,
    )


def settings_of_six(config):
    """What config.json says of an RWKV-6. rescale_every=0: the weights are used as trained."""
    return dict(
        architectures=["Rwkv6ForCausalLM"],
        **FIXED_SIX,
        attention_hidden_size=config.n_embd,
        head_size=config.head_size,
        rescale_every=0,
    )


def ranks_of_six(config):
    """The ranks of an RWKV-6 in words, where they are not those that llama.cpp's converter takes
    for granted; ""."""
    expected = (64, 128) if config.n_embd == 4096 else (32, 64)
    if config.version != "x060" or (config.mix_rank, config.decay_rank) == expected:
        return ""
    return f"mix_rank={config.mix_rank} and decay_rank={config.decay_rank}, not {expected}"


# ----------------------------------------------------------------------------------------------
# rwkvtune's and rwkvserve's folder


def check_for_rwkvtune(config, tokenizer, path):
    """UserError for what their loader takes without an error and computes something else with."""
    expected = {  # size: what it is there
        "version": "x070",
        "head_size": 64,
        "dim_ffn": 4 * config.n_embd,
        "iclr_rank": config.decay_rank,  # they have one number for both
    }
    for size, value in expected.items():
        if getattr(config, size) != value:
            raise UserError(
                f"{path}: {size} is {getattr(config, size)}; rwkvtune has {value} there and "
                "loads nothing else"
            )
    if config.n_layer == 1:
        raise UserError(f"{path} has one layer; rwkvtune divides by the number of layers less one")
    if hasattr(tokenizer, "hub") or tokenizer.words:
        raise UserError(
            f"tokenizer {tokenizer.name} has no vocab file in World's format, and rwkvtune reads "
            "no other tokenizer"
        )


def write_rwkvtune_vocab(tokenizer, folder):
    """The vocab file, with a line for id 0, the end, which World's file does not have: ids without
    a token make their decoder give up. Not as vocab.txt, for here that is a file without the line.
    """
    end = f"0 {END_TOKEN!r} {len(END_TOKEN)}\n"
    write_text(folder / VOCAB_OF_ENGINES, end + vocab_text(tokenizer))


def rwkvtune_settings(config):
    """{file: value} of that folder's JSON files; every size is told, none is left to a rule."""
    ids = dict(bos_token_id=None, eos_token_id=0, pad_token_id=0)
    network = dict(
        model_type="rwkv7",
        architectures=["RWKV7Model"],
        my_testing="x070",
        n_layer=config.n_layer,
        n_embd=config.n_embd,
        dim_att=config.n_embd,
        dim_ffn=config.dim_ffn,
        vocab_size=config.vocab_size,
        head_size_a=config.head_size,
        head_size_divisor=8,
        dim_att_lora=config.decay_rank,
        dim_mv_lora=config.value_rank,
        dim_gate_lora=config.gate_rank,
        ctx_len=4096,  # its training refuses longer texts; make it larger there at will
        tie_word_embeddings=False,
        use_cache=True,
    )
    tokenizer_settings = dict(
        tokenizer_class="RWKV_TOKENIZER",
        eos_token=END_TOKEN,
        pad_token=END_TOKEN,
        clean_up_tokenization_spaces=False,
        # Their template knows no eos_token.
        chat_template=CHAT_TEMPLATE.replace("eos_token", repr(END_TOKEN)),
    )
    sampling = dict(do_sample=True, temperature=1.0, top_p=1.0, top_k=0)
    return {
        "config.json": {**network, **ids},
        "tokenizer_config.json": tokenizer_settings,
        "generation_config.json": {**ids, **sampling},
    }
