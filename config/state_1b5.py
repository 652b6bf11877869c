# A learned start for RWKV-7 1.5B: 3.1 million numbers, a file of 12.6 MB, on one card of 16 GB. Not
# measured yet. data: a JSONL of {"messages": …}, or a folder of them for a state each; look first:
#   python prepare.py show data/persona.jsonl
data = "data/persona.jsonl"
val_data = "data/persona_val.jsonl"
init_from = "weights/rwkv7-g1a-1.5b-20250922-ctx4096.pth"
out_dir = "out/state_1b5"
ctx_len = 1024
micro_bsz = 4
global_bsz = 16
lr = 1e-2
lr_final = 1e-4
warmup_steps = 20
epochs = 3.0
grad_cp = True
eval_every = 100
eval_off = True
