# A reward model on RWKV-7 1.5B, one 80 GB card; --tune=lora --lr=1e-4 --lr_final=1e-5 fits 24 GB.
# Not measured yet. data: JSONL of {"prompt": text or messages, "chosen", "rejected"}; to sum it up:
#   python prepare.py pairs data/prefs.jsonl
data = "data/prefs.jsonl"
val_data = "data/prefs_val.jsonl"
init_from = "out/sft_1b5/rwkv-final.pth"
out_dir = "out/reward_1b5"
center_coef = 0.01
ctx_len = 2048
micro_bsz = 4
global_bsz = 64
lr = 9e-6
lr_final = 9e-7
warmup_steps = 20
epochs = 1.0
grad_cp = True
eval_every = 100
