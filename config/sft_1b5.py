# RWKV-7 1.5B on your conversations, one 80 GB card; --tune=lora --lr=2e-4 --lr_final=2e-5 fits
# 24 GB. Not measured yet. data: a JSONL of {"messages": [{"role", "content"}]}; look at it first:
#   python prepare.py show data/chats.jsonl
data = "data/chats.jsonl"
val_data = "data/chats_val.jsonl"
init_from = "weights/rwkv7-g1a-1.5b-20250922-ctx4096.pth"
out_dir = "out/sft_1b5"
ctx_len = 4096
micro_bsz = 4
global_bsz = 32
lr = 1e-5
lr_final = 1e-6
warmup_steps = 50
epochs = 2.0
grad_cp = True
eval_every = 100
save_every = 500
