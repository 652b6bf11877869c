# DPO with an NLL term on pairs of the small model's own answers, one right and one wrong. First:
# config/sft_tiny.py, then
#   python sample.py batch data/tasks_prompts.jsonl data/tasks_samples.jsonl \
#       --model=out/sft_tiny/rwkv-final.pth --n=8 --max_new_tokens=20 --temperature=1.5 --seed=42
#       (at temperature 1 most prompts have no wrong answer among eight)
#   python tasks.py pairs data/tasks_samples.jsonl --out=data/tasks_pairs
import tasks

data = "data/tasks_pairs.jsonl"
val_data = "data/tasks_pairs_val.jsonl"
init_from = "out/sft_tiny/rwkv-final.pth"
out_dir = "out/dpo_tiny"
beta = 0.3
nll_coef = 10.0  # the weight of what is right; 0 is plain DPO, which loses here
ctx_len = 128
micro_bsz = 64
global_bsz = 64
lr = 5e-4
lr_final = 2e-5
warmup_steps = 10
max_steps = 200
eval_every = 0
save_every = 0
eval_fn = tasks.exact_match  # of greedy answers to 1,000 held-out tasks
