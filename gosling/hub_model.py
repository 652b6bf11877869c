"""RWKV-7 for transformers, in plain PyTorch: any device, nothing to compile, one file. A folder
that gosling's export.py hub writes has it as modeling_rwkv7.py; it needs torch and transformers:

    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)

Names of parameters are flash-linear-attention's. B rows, T tokens, C channels, H heads of N. The
state is what other models call a cache, and a value: {"wkv": [L, B, H, N, N] float32, rows = value,
columns = key; "att_shift", "ffn_shift": [L, B, C]; "seen": how many tokens it has read, padding
included}. One row (B = 1) is for all rows of a batch. Padding may be anywhere and changes nothing.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from transformers import GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.utils import ModelOutput


class RWKV7Config(PretrainedConfig):
    model_type = "rwkv7"
    keys_to_ignore_at_inference = ["state"]
    sizes = dict(hidden_size=768, num_hidden_layers=12, intermediate_size=3072, vocab_size=65536)
    sizes |= dict(decay_low_rank_dim=64, a_low_rank_dim=64, v_low_rank_dim=32, head_dim=64)
    sizes |= dict(gate_low_rank_dim=128)

    def __init__(self, **kwargs):
        super().__init__(**{**self.sizes, "tie_word_embeddings": False, **kwargs})
        self.use_cache = kwargs.get("use_cache", True)


@dataclass
class RWKV7Output(ModelOutput):
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None  # [B, T, V]
    state: dict | None = None
    hidden_states: tuple | None = None  # what each layer reads, and the head, each [B, T, C]


def token_shift(x, shift, last):
    """x [B, T, C] and the input before the first token, shift [B, C]
    -> (x of the token before each, [B, T, C], the new shift). last [B, T + 1]: with padding, the
    number of the last token before each place and at the end, counted from 1; 0 = there is none."""
    seen = torch.cat([shift[:, None].to(x.dtype), x], 1)
    if last is not None:
        seen = seen.gather(1, last[..., None].expand(-1, -1, x.shape[-1]))
    return seen[:, :-1], seen[:, -1]


def wkv7(r, logw, k, v, a, b, S, mask):
    """The recurrence, as the plain loop that defines it: a prompt of T tokens takes T steps.

    r logw k v a b [B, T, H, N] float32, S [B, H, value, key] -> (y [B, T, H, N], S). Padding, where
    mask [B, T] is False, leaves S as it is."""
    w, ys = logw.exp(), []
    for t in range(r.shape[1]):
        new = S * w[:, t, :, None] + S @ a[:, t, ..., None] * b[:, t, :, None]
        new = new + v[:, t, ..., None] * k[:, t, :, None]
        S = new if mask is None else torch.where(mask[:, t, None, None, None], new, S)
        ys.append(S @ r[:, t, ..., None])
    return torch.stack(ys, 1).squeeze(-1), S


def low_rank(C, rank, activation, bias=True):
    """A module whose lora(x) is up(activation(down(x))), under fla's names."""
    layers = nn.Linear(C, rank, bias=False), activation, nn.Linear(rank, C, bias=bias)
    return nn.ModuleDict({"lora": nn.Sequential(*layers)})


class TimeMix(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C, self.N = config.hidden_size, config.head_dim
        for x in "rwkvag":
            setattr(self, f"x_{x}", nn.Parameter(torch.zeros(1, 1, C)))
        self.k_k, self.k_a = nn.Parameter(torch.zeros(C)), nn.Parameter(torch.zeros(C))
        self.r_k = nn.Parameter(torch.zeros(C // self.N, self.N))
        self.r_proj, self.k_proj = nn.Linear(C, C, bias=False), nn.Linear(C, C, bias=False)
        self.v_proj, self.o_proj = nn.Linear(C, C, bias=False), nn.Linear(C, C, bias=False)
        self.w_lora = low_rank(C, config.decay_low_rank_dim, nn.Tanh())
        self.a_lora = low_rank(C, config.a_low_rank_dim, nn.Identity())
        if layer > 0:
            self.v_lora = low_rank(C, config.v_low_rank_dim, nn.Identity())
        self.g_lora = low_rank(C, config.gate_low_rank_dim, nn.Sigmoid(), bias=False)
        self.g_norm = nn.GroupNorm(C // self.N, C, eps=64e-5)

    def forward(self, x, v_first, S, shift, mask, last):
        x_prev, shift = token_shift(x, shift, last)
        delta = x_prev - x
        x_v = x + delta * self.x_v
        r = self.r_proj(x + delta * self.x_r)
        k = self.k_proj(x + delta * self.x_k)
        v = self.v_proj(x_v)
        a = torch.sigmoid(self.a_lora.lora(x + delta * self.x_a))
        g = self.g_lora.lora(x + delta * self.x_g)
        # The decay is worked out in float32, whatever the weights are.
        down, activation, up = self.w_lora.lora
        h = F.linear(activation(down(x + delta * self.x_w)), up.weight).float()
        logw = -math.exp(-0.5) * torch.sigmoid(h + up.bias.float())
        if v_first is not None:
            v = v + (v_first - v) * torch.sigmoid(self.v_lora.lora(x_v))
        v_first = v if v_first is None else v_first
        kappa, k = k * self.k_k, k * (1 + (a - 1) * self.k_a)
        by_head = (t.unflatten(-1, (-1, self.N)).float() for t in (r, logw, k, v, a, kappa))
        r, logw, k, v, a, kappa = by_head
        kappa = F.normalize(kappa, dim=-1)
        y, S = wkv7(r, logw, k, v, -kappa, kappa * a, S, mask)
        bonus = (r * k * self.r_k).sum(-1, keepdim=True) * v  # the current token, by itself
        y = self.g_norm(y.flatten(0, 1).flatten(1).to(x.dtype)).view(x.shape)
        return self.o_proj((y + bonus.flatten(2).to(x.dtype)) * g), v_first, S, shift


class ChannelMix(nn.Module):
    def __init__(self, config):
        super().__init__()
        C, n_ffn = config.hidden_size, config.intermediate_size
        self.key, self.value = nn.Linear(C, n_ffn, bias=False), nn.Linear(n_ffn, C, bias=False)
        self.x_k = nn.Parameter(torch.zeros(C))

    def forward(self, x, shift, last):
        x_prev, shift = token_shift(x, shift, last)
        return self.value(torch.relu(self.key(x + (x_prev - x) * self.x_k)) ** 2), shift


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        C = config.hidden_size
        if layer == 0:
            self.pre_norm = nn.LayerNorm(C)
        self.attn_norm, self.ffn_norm = nn.LayerNorm(C), nn.LayerNorm(C)
        self.attn, self.ffn = TimeMix(config, layer), ChannelMix(config)

    def forward(self, x, v_first, S, att_shift, ffn_shift, mask, last):
        if hasattr(self, "pre_norm"):
            x = self.pre_norm(x)
        h, v_first, S, att_shift = self.attn(self.attn_norm(x), v_first, S, att_shift, mask, last)
        x = x + h
        h, ffn_shift = self.ffn(self.ffn_norm(x), ffn_shift, last)
        return x + h, v_first, (S, att_shift, ffn_shift)


class RWKV7Model(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.N = config.head_dim
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size)

    def forward(self, x, state=None, mask=None):
        """x [B, T, C] of the embedding, mask [B, T] or None
        -> (what each layer reads and the head, each [B, T, C], state)"""
        (B, T, C), L, N, last = x.shape, len(self.layers), self.N, None
        if state is None:
            wkv, shift = x.new_zeros(L, B, C // N, N, N, dtype=torch.float32), x.new_zeros(L, B, C)
            state = {"wkv": wkv, "att_shift": shift, "ffn_shift": shift}
        if mask is not None:
            numbers = torch.arange(1, T + 1, device=x.device) * mask
            last = F.pad(numbers.cummax(1).values, (1, 0))
        kinds, v_first, hidden, after = ("wkv", "att_shift", "ffn_shift"), None, [], []
        for i, block in enumerate(self.layers):
            hidden.append(x)
            before = (state[kind][i].expand(B, *state[kind].shape[2:]) for kind in kinds)
            x, v_first, layer = block(x, v_first, *before, mask, last)
            after.append(layer)
        after = dict(zip(kinds, map(torch.stack, zip(*after, strict=True)), strict=True))
        return (*hidden, self.norm(x)), {**after, "seen": state.get("seen", 0) + T}


class RWKV7ForCausalLM(PreTrainedModel, GenerationMixin):
    config_class = RWKV7Config
    base_model_prefix = "model"
    _no_split_modules = ["Block"]
    _is_stateful = True  # no going back to an earlier token, as assisted generation would

    def __init__(self, config):
        super().__init__(config)
        self.model = RWKV7Model(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self):
        return self.model.embeddings

    def set_input_embeddings(self, embeddings):
        self.model.embeddings = embeddings

    def get_output_embeddings(self):
        return self.lm_head

    def set_output_embeddings(self, head):
        self.lm_head = head

    def forward(
        self,
        input_ids=None,
        attention_mask=None,
        inputs_embeds=None,
        state=None,
        labels=None,
        use_cache=None,
        logits_to_keep=0,
        output_hidden_states=None,
        return_dict=True,
        **kwargs,
    ):
        """attention_mask [B, T or more], 0 = padding; of a longer one, the end is these tokens'.
        labels are shifted here. logits_to_keep: of so many last tokens, 0 = of all."""
        x = self.model.embeddings(input_ids) if inputs_embeds is None else inputs_embeds
        mask = None if attention_mask is None else attention_mask[:, -x.shape[1] :].bool()
        hidden, state = self.model(x, state, None if mask is None or mask.all() else mask)
        output = RWKV7Output(logits=self.lm_head(hidden[-1][:, -logits_to_keep:]))
        if labels is not None:
            sizes = {"vocab_size": self.config.vocab_size, **kwargs}
            output.loss = self.loss_function(logits=output.logits, labels=labels, **sizes)
        if use_cache or (use_cache is None and self.config.use_cache):
            output.state = state
        if output_hidden_states or self.config.output_hidden_states:
            output.hidden_states = hidden
        return output.to_tuple() if return_dict is False else output

    # For generate(). The state has a name of its own, so that no version of transformers takes it
    # for keys and values; beam search of older ones looks under their name.
    @classmethod
    def _supports_default_dynamic_cache(cls):
        return False

    def prepare_inputs_for_generation(self, input_ids, state=None, attention_mask=None, **kwargs):
        """Each step is given the whole text; what the state has not read goes on."""
        other = kwargs.get("past_key_values")
        state = other if other and "reordered" in other else state
        seen = state.get("seen", 0) if state else 0
        if seen >= input_ids.shape[1]:
            raise ValueError(f"the state has read {seen} tokens already; give the whole text")
        inputs = {"input_ids": input_ids[:, seen:], "attention_mask": attention_mask}
        return {**kwargs, **inputs, "state": state}

    def _update_model_kwargs_for_generation(self, outputs, model_kwargs, *args, **kwargs):
        update = super()._update_model_kwargs_for_generation
        model_kwargs = update(outputs, model_kwargs, *args, **kwargs)
        states = {"state": outputs.state, "past_key_values": outputs.state}
        return model_kwargs if outputs.state is None else {**model_kwargs, **states}

    @staticmethod
    def _reorder_cache(state, beam_idx):
        rows = {key: value[:, beam_idx] for key, value in state.items() if key != "seen"}
        return {**rows, "seen": state["seen"], "reordered": True}
