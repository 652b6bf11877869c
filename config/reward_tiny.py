# A reward model of the small model's own answers, one right and one wrong to each prompt. First the
# pairs of dpo_tiny.py.
data = "data/tasks_pairs.jsonl"
val_data = "data/tasks_pairs_val.jsonl"
init_from = "out/sft_tiny/rwkv-final.pth"
out_dir = "out/reward_tiny"
center_coef = 0.01
ctx_len = 128
micro_bsz = 64
global_bsz = 64
lr = 1e-3
lr_final = 1e-4
warmup_steps = 10
max_steps = 300
eval_every = 100
save_every = 0
