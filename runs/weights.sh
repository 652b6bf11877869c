# Sourced by the recipes: official weights, once.      weights NAME -> the file's path in $MODEL
# G1 files think when asked to; all of them, 0.1B to 13.3B: https://huggingface.co/BlinkDL/rwkv7-g1
weights() {
    MODEL="weights/$1"
    [ -f "$MODEL" ] || { pip install --quiet huggingface_hub && hf download BlinkDL/rwkv7-g1 "$1" --local-dir weights; }
}
