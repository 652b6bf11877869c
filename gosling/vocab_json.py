"""World and other vocabularies {id: bytes} as a Hugging Face tokenizer.json, no code of its own.

export.py hub writes it. VocabTokenizer cuts text by greedy longest match on its bytes. Here, a
regular expression first cuts out the longest tokens that are whole characters; a character that
begins none stands alone, and WordPiece cuts its bytes, by longest match, too.
"""

from gosling.tokenizer import END_TOKEN

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

NO_TOKEN = "[no token]"  # is in no vocabulary, so that text without a token raises an exception
LONGEST = 200  # characters of a token; the regular expression is nested as deep
WHITE_SPACE = "".join(chr(c) for c in range(0x3001) if chr(c).isspace())  # where str.split cuts


def tokenizer_json(tokenizer):
    """A VocabTokenizer -> (the text of a tokenizer.json, ""), or ("", why there is none for it)."""
    if END_TOKEN.encode() in tokenizer.ids:
        return "", f"{END_TOKEN}, which stands for id 0 there, is a token of its own"
    crossing = [token for token in tokenizer.ids if crosses_characters(token)]
    if crossing:
        return "", f"its token {crossing[0]!r:.60} begins or ends inside a character"
    if max(len(token) for token in tokenizer.ids) > LONGEST:
        return "", f"it has a token of more than {LONGEST} bytes"
    hub = words_tokenizer(tokenizer) if tokenizer.words else longest_match_tokenizer(tokenizer)
    hub.add_special_tokens([AddedToken(END_TOKEN, special=True)])
    return hub.to_str(), ""


def text_of(token):
    """The characters of a token; "" if its bytes are no whole characters."""
    try:
        return token.decode()
    except UnicodeDecodeError:
        return ""


def crosses_characters(token):
    """Whether it has one character's bytes and a part of another's: cutting at characters first
    would miss it. A part of one character alone, or what is in no text, does no harm."""
    return not text_of(token) and any(not 0x80 <= byte < 0xC0 for byte in token[1:])


def words_tokenizer(tokenizer):
    """Every word is a token; words are parted by white space, which is dropped."""
    vocab = {token.decode(): i for token, i in tokenizer.ids.items()}
    hub = Tokenizer(models.WordLevel({**vocab, END_TOKEN: 0}, unk_token=NO_TOKEN))
    white_space = Regex(f"[{''.join(map(escaped, WHITE_SPACE))}]+")
    hub.pre_tokenizer = pre_tokenizers.Split(white_space, "removed")
    return hub  # without a decoder, words are joined by spaces


def longest_match_tokenizer(tokenizer):
    letters = letters_of_bytes()
    vocab = {"".join(letters[b] for b in token): i for token, i in tokenizer.ids.items()}
    model = models.WordPiece(
        {**vocab, END_TOKEN: 0},
        unk_token=NO_TOKEN,
        max_input_chars_per_word=LONGEST,
        continuing_subword_prefix="",
    )
    texts = [text_of(token) for token in tokenizer.ids]
    branches = longest_of([text for text in texts if len(text) > 1])
    pattern = f"{branches}|(?m:.)" if branches else "(?m:.)"  # (?m:.) is any character
    hub = Tokenizer(model)
    hub.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(pattern), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    hub.decoder = decoders.ByteLevel()
    return hub


def letters_of_bytes():
    """The letter that byte-level tokenizers write for each of the 256 bytes, as GPT-2 chose them:
    a printable byte is itself, the others are U+0100 and on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    letters = {byte: chr(byte) for byte in printable}
    return letters | {byte: chr(0x100 + n) for n, byte in enumerate(others)}


def longest_of(texts):
    """A regular expression that matches the longest of these texts; "" of none.

    It is the texts' tree of letters: what they share is there once, so that a match takes no longer
    than the text it reads.
    """
    tree = {}
    for text in texts:
        node = tree
        for c in text:
            node = node.setdefault(c, {})
        node[""] = {}  # a text ends here
    return expression(tree)


def expression(node):
    """What may follow at a node of the tree."""
    leaves = [c for c in node if c and list(node[c]) == [""]]
    branches = [escaped(c) + expression(node[c]) for c in node if c and c not in leaves]
    if leaves:
        branches.append(f"[{''.join(map(escaped, leaves))}]")
    if len(branches) > 1 or (branches and "" in node):
        optional = "?" if "" in node else ""
        return f"(?:{'|'.join(branches)}){optional}"
    return "".join(branches)


def escaped(c):
    return f"\\x{{{ord(c):x}}}"
