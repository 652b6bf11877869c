# RWKV-7 0.1B as RWKV-LM's minipile demo trains it: its data file, its order of windows, its loss
# table.
#   minipile.bin / minipile.idx: the files of RWKV-LM's RWKV-v7/train_temp, 1,498,226,207 World
#   tokens, prime 2,926,181
#   mean loss of each 20.6 M tokens as upstream publishes it (+- 0.01):
#   4.876 4.029 3.802 3.663 3.579 3.511 3.462 …
#   torchrun --nproc_per_node=1 train_pretrain.py config/pretrain_0b1.py
data = "data/minipile"
tokenizer = "world"
order = "magic_prime"
out_dir = "out/pretrain_0b1"
version = "x070"
n_layer = 12
n_embd = 768
ctx_len = 512
micro_bsz = 16
global_bsz = 16
lr = 6e-4
lr_final = 6e-5
warmup_steps = 10
weight_decay = 0.001
l2wrap = 1e-4
max_steps = 182_886  # once over: prime // 16
eval_every = 0
save_every = 2_000
log_every = 50
