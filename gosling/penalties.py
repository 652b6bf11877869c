"""Penalties of a sampler: logits that depend on which tokens a slot had.

V vocabulary, rows of the engine's slots.
"""

import torch


class Penalties:
    """What moves the logits away from the model's own: which tokens each slot had, how often."""

    def __init__(self, model, width):
        device, shape = model.emb.weight.device, (width, model.config.vocab_size)
        self.count = torch.zeros(shape, device=device)  # how often generated, decaying
        self.generated = torch.zeros(shape, dtype=torch.bool, device=device)
        self.read = torch.zeros_like(self.generated)  # generated or in the prompt

    def take(self, index):
        """Go on with these rows, in this order."""
        self.count, self.generated = self.count[index], self.generated[index]
        self.read = self.read[index]

    def start(self, row, prompt_ids):
        """A slot begins anew."""
        self.count[row], self.generated[row], self.read[row] = 0, False, False
        self.read[row, prompt_ids] = True

    def apply(self, logits, rows, request):
        """logits [rows, V] of these slots -> those that the choice is made from"""
        o, logits = request.options, logits.float()
        factor = torch.where(logits > 0, 1 / o.repetition_penalty, o.repetition_penalty)
        logits = torch.where(self.read[rows], logits * factor, logits)
        held_back = o.presence_penalty * self.generated[rows]
        held_back = held_back + o.frequency_penalty * self.count[rows]
        return logits - held_back + request.bias

    def add(self, rows, ids, options):
        """Count the tokens chosen. As in the RWKV runners, blanks and digits count 0 times."""
        weights = torch.ones(len(ids), device=ids.device)
        if options.tokenizer is not None:
            texts = [options.tokenizer.decode([token]) for token in ids.tolist()]
            weights = torch.tensor([text not in " \t0123456789" for text in texts]).to(weights)
        self.count[rows] *= options.penalty_decay
        self.count[rows, ids] += weights
        self.generated[rows, ids] = self.read[rows, ids] = True
