# A small RWKV-7 on the Python standard library's sources, in minutes on two CPU cores:
#   runs/pretrain_python.sh
from gosling.runs import fast_dtype

data = "data/stdlib_train"
val_data = "data/stdlib_val"
out_dir = "out/pretrain_tiny"
n_layer = 4
n_embd = 128
dtype = fast_dtype()  # bfloat16 where this CPU multiplies it faster; the loss is the same
ctx_len = 256
micro_bsz = 8
global_bsz = 8
lr = 6e-3
lr_final = 6e-4
warmup_steps = 20
max_steps = 900
eval_every = 225
eval_windows = 64
save_every = 225
