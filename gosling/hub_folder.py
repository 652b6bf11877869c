"""What lies in a folder of flash-linear-attention's RWKV-7; export.py hub writes it."""

from gosling.files import atomic_write
from gosling.hub import FIXED, fla_name
from gosling.tokenizer import END_TOKEN
from gosling.vocab_json import tokenizer_json

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
TOKENIZER_FILES = ("tokenizer.json", "vocab.txt", VOCAB_OF_ENGINES)


def fla_tensors(weights):
    """{official name: tensor}, which is emptied -> {fla's name: tensor as fla has it}"""
    theirs = {}
    for name in list(weights):
        new_name, transposed = fla_name(name)
        w = weights.pop(name)
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
    for name in TOKENIZER_FILES:  # of an older export
        (folder / name).unlink(missing_ok=True)
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
        "tokenizer_config.json": tokenizer_settings,
        "generation_config.json": {**ids, **sampling},
        "config.json": network,
    }
