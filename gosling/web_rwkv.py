"""web-rwkv's files, .st, which Ai00 reads too: other names for RWKV-6, small matrices turned.

read_weights and write_weights of gosling/weights.py go through this for a file that ends in .st.
"""

import re

RENAMED = {"time_maa_": "time_mix_", "time_faaaa": "time_first"}  # all of RWKV-6
# Low-rank pairs multiply from the right here, [in, rank] and [rank, out], and are the weights of
# Linear layers there. A state is [H, value, key] here and [H, key, value] there.
TURNED = re.compile(r"\.(time_(maa|mix|decay)_w[12]|[wavg][12]|time_state)$")


def turned(name, w):
    """A tensor between our orientation and web-rwkv's: the same step both ways."""
    is_matrix = w.dim() >= 2  # of a file that is wrong it may not be
    return w.mT.contiguous() if is_matrix and TURNED.search(name) else w


def converted(weights, names):
    """{name: tensor} under other names, in the other orientation. names: {part of one: its new}"""
    found = {}
    for name, w in weights.items():
        new_name = name
        for old, new in names.items():
            new_name = new_name.replace(old, new)
        found[new_name] = turned(name, w)
    return found


def to_web_rwkv(weights):
    """{official name: tensor} -> {web-rwkv's name: tensor}"""
    return converted(weights, RENAMED)


def from_web_rwkv(theirs):
    """{web-rwkv's name: tensor} -> {official name: tensor}"""
    return converted(theirs, {new: old for old, new in RENAMED.items()})
