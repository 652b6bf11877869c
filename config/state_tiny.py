# A command that the small model of tasks.py never saw, as a learned start: 400 rows. First:
# config/sft_tiny.py.
import tasks

data = "data/tasks_unseen.jsonl"
init_from = "out/sft_tiny/rwkv-final.pth"
out_dir = "out/state_tiny"
ctx_len = 128
micro_bsz = 32
global_bsz = 32
lr = 1e-1
lr_final = 1e-2
layers = (0, 1, 2, 3)  # 16,384 numbers; all five are not better
max_steps = 300
eval_every = 0
save_every = 0


def eval_fn(model, tokenizer):
    """Exact match of greedy answers to 1,000 held-out tasks of the unseen command."""
    return tasks.exact_match(model, tokenizer, skills=[tasks.UNSEEN])
