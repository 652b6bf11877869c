"""What the JSON files that are read back hold: a class for each kind, for files.checked.

Keys that a class does not name may hold anything. Numbers are of the right kind from the start,
so that no text stands for one. At the end: what the server of serve.py is sent, where a key that is
not named is an error.
"""

import math
import typing
from pathlib import PurePath

import pydantic
from pydantic import Field, FiniteFloat, PositiveFloat


def check_path(text):
    """ValueError for what no file system has as a name. Half characters are in some names."""
    is_good = isinstance(text, str) and len(text) < 4000 and min(text, default=" ") >= " "
    if not is_good or any(
        len(part.encode("utf-8", "replace")) > 255 for part in PurePath(text).parts
    ):
        raise ValueError("expected the name of a file")
    return text


def check_text(text):
    """ValueError for half a character, which no file takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("expected whole characters") from None
    return text


def check_number(text):
    """ValueError for text that is no finite number above 0."""
    try:
        is_good = len(text) < 40 and math.isfinite(float(text)) and float(text) > 0
    except ValueError:
        is_good = False
    if not is_good:
        raise ValueError("expected a number above 0")
    return text


def check_integer(number):
    """ValueError for an integer, in the place of a float, that no tensor holds."""
    if isinstance(number, int) and abs(number) >= 2**63:
        raise ValueError("expected a number below 2^63")
    return number


def check_plain(value):
    """ValueError for what `primitive` of files.py does not make: no number, text, list or dict."""
    inside = value if isinstance(value, (list, tuple)) else ()
    for item in value.values() if isinstance(value, dict) else inside:
        check_plain(item)
    if not isinstance(value, (str, int, float, list, tuple, dict, type(None))):
        raise ValueError("expected numbers, text, lists and dicts")
    return value


Count = typing.Annotated[int, Field(ge=0, lt=2**63)]
Number = typing.Annotated[float, pydantic.BeforeValidator(check_integer)]
FiniteNumber = typing.Annotated[FiniteFloat, pydantic.BeforeValidator(check_integer)]
MaskValue = typing.Annotated[float | bool, Field(ge=0, le=1)]
Text = typing.Annotated[str, pydantic.AfterValidator(check_text)]
FileName = typing.Annotated[object, pydantic.AfterValidator(check_path)]
NumberInText = typing.Annotated[str, pydantic.AfterValidator(check_number)]
# Written by this repository's runs, see runs.NUMBERED.
Checkpoint = typing.Annotated[
    str, Field(pattern=r"^(.*/)?(rwkv|lora|state)-[0-9]{1,18}\.(pth|safetensors)$", max_length=4000)
]


# A folder beside last.pt, see last.write_shares.
Shares = typing.Annotated[str, Field(pattern=r"^shares-[0-9]{1,18}(-[0-9]{1,9})?$")]


class Note(pydantic.BaseModel):
    """An object of JSON."""

    model_config = pydantic.ConfigDict(extra="allow", strict=True)


class Sidecar(Note):
    """<prefix>.json beside a token file."""

    tokenizer: FileName | None = None
    tokenizer_digest: str | None = None
    vocab_size: Count = 1
    documents: Count = 0
    tokens: Count = 0
    bytes: Count = 0


class RunConfig(Note):
    """config.json of a run's folder; another program's may lie there, too."""

    tokenizer: FileName | None = None
    tokenizer_digest: str | None = None


class RunNotes(Note):
    """run.json: which run of wandb or swanlab it is, and the checkpoints that it wrote."""

    id: typing.Annotated[str, Field(max_length=128)] = ""
    checkpoints: list[Checkpoint] = []
    shares: list[Shares] = []


class Adapter(Note):
    """adapter_config.json of PEFT."""

    peft_type: str | None = None
    lora_alpha: PositiveFloat | None = None
    use_rslora: bool | None = None
    init_lora_weights: bool | str | None = None
    base_model_name_or_path: FileName | None = None


class About(Note):
    """What a .safetensors says of itself: text alone."""

    alpha: NumberInText = "1"
    model: FileName = ""
    tokenizer: FileName = ""


class State(Note):
    """The .json of a tuned state."""

    model: FileName = ""
    fingerprint: str | None = None
    tokenizer: FileName = ""
    score: list[FiniteNumber] | None = None
    att_shift: list[list[Number]] | None = None
    ffn_shift: list[list[Number]] | None = None


class Measured(Note):
    """A line of metrics.jsonl: the step, and a number under each name."""

    __pydantic_extra__: dict[str, Number | bool | None]
    step: Count


class Message(Note):
    content: Text


class Candidate(Note):
    """A line of candidates.jsonl, of self_reward.py."""

    number: Count
    candidate: Count
    prompt: Text | list[dict]
    text: Text
    tokens: Count
    ids: list[Count] = []


class Judgement(Note):
    """A line of scores.jsonl."""

    number: Count
    candidate: Count
    score: FiniteNumber | None
    parsed: FiniteNumber
    said: list[Text] = []


class Pair(Note):
    """A line of pairs.jsonl."""

    prompt: Text | typing.Annotated[list[dict], Field(min_length=1)]
    chosen: Text
    rejected: Text
    chosen_score: Number | None = None
    rejected_score: Number | None = None


class Answer(Note):
    text: Text


class Sampled(Note):
    """A row of tasks.py with its completions, as sample.py batch writes it."""

    prompt: typing.Annotated[list[Message], Field(min_length=1)]
    completions: list[Answer | Text]
    skill: Text


class Report(Note):
    """What a stage says of itself in done.json."""

    __pydantic_extra__: dict[str, Number | None]
    dropped: dict[Text, int] = {}


class Done(Note):
    """done.json of a stage."""

    stage: typing.Annotated[str, Field(pattern="^[0-9]{2,4}-[a-z_]+$")]
    init_from: FileName = ""
    judge_model: FileName = ""
    undone: FileName = ""
    report: Report = Report()
    value: FiniteNumber | None = None
    tokens: Number | None = None
    kl: Number | None = None


class Completion(Note):
    """One of a group's answers, in last.pt of train_grpo.py."""

    tokens: list[Count]
    mask: list[MaskValue]
    logprobs: list[Number] | None
    old: list[Number] | None = None
    text: str
    finish_reason: str

    @pydantic.model_validator(mode="after")
    def check_lengths(self):
        for numbers in (self.mask, self.logprobs or None, self.old):
            if numbers is not None and len(numbers) != len(self.tokens):
                raise ValueError("expected as many numbers as tokens")
        return self


class Group(Note):
    """A prompt and its answers, sampled and rewarded, that are still to be trained on."""

    number: Count
    ids: list[Count]
    completions: list[Completion]
    reward: list[Number]
    rewards: dict[str, list[Number | None]]
    advantages: list[FiniteNumber]

    @pydantic.model_validator(mode="after")
    def check_lengths(self):
        for numbers in (self.reward, self.advantages, *self.rewards.values()):
            if len(numbers) != len(self.completions):
                raise ValueError("expected as many numbers as completions")
        return self


class Optimizer(Note):
    """optimizer of last.pt; the tensors are looked at in last.py."""

    state: dict[int, dict[str, object]]
    param_groups: typing.Annotated[list[dict[str, object]], pydantic.AfterValidator(check_plain)]


class Last(Note):
    """last.pt without its tensors."""

    step: Count
    same: typing.Annotated[dict[str, object], pydantic.AfterValidator(check_plain)]
    best_loss: Number = math.inf
    best_losses: dict[str, Number] = {}
    waited: Count = 0
    cursor: Count = 0
    groups: list[Group] = []
    shares: Shares | None = None
    digests: dict[str, str] = {}  # of its files


# ----------------------------------------------------------------------------------------------
# requests to the server


class Sent(pydantic.BaseModel):
    """An object of JSON in which null is as good as nothing."""

    model_config = pydantic.ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @pydantic.model_validator(mode="before")
    @classmethod
    def leave_out_nulls(cls, sent):
        if not isinstance(sent, dict):
            return sent
        return {key: value for key, value in sent.items() if value is not None}


class StreamOptions(Sent):
    include_usage: bool = False
    include_obfuscation: bool = False  # the client may ask for padding; none is sent


class TextFormat(Sent):
    type: typing.Literal["text", "json_object"]


class NamedSchema(Sent):
    schema_: dict[str, object] = Field(alias="schema")
    # What clients send and what changes nothing: every schema is kept to.
    name: object = None
    description: object = None
    strict: object = None


class SchemaFormat(Sent):
    type: typing.Literal["json_schema"]
    json_schema: NamedSchema


Format = typing.Annotated[TextFormat | SchemaFormat, Field(discriminator="type")]

StopText = typing.Annotated[Text, Field(max_length=1000)]
Id = typing.Annotated[str, Field(pattern="^[0-9]{1,9}$")]


class Generation(Sent):
    """What OpenAI's requests for text have in common; the engine checks ranges of sampling."""

    model: str
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    n: typing.Annotated[int, Field(ge=1, le=128)] = 1
    max_tokens: typing.Annotated[int, Field(ge=1)] | None = None
    stop: StopText | typing.Annotated[list[StopText], Field(max_length=32)] = []
    temperature: float | None = None
    top_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    logit_bias: dict[Id, float] = {}
    response_format: Format | None = None
    # Not OpenAI's, but of the engine.
    regex: typing.Annotated[str, Field(min_length=1)] | None = None
    top_k: int | None = None
    min_p: float | None = None
    penalty_decay: float | None = None
    repetition_penalty: float | None = None
    # What clients send and what changes nothing.
    user: object = None
    metadata: object = None
    store: object = None
    service_tier: object = None
    prompt_cache_key: object = None
    safety_identifier: object = None


class ChatRequest(Generation):
    """/v1/chat/completions"""

    messages: typing.Annotated[list[object], Field(min_length=1)]
    max_completion_tokens: typing.Annotated[int, Field(ge=1)] | None = None
    logprobs: bool = False
    top_logprobs: typing.Literal[0] = 0
    think: typing.Literal["on", "off"] | None = None  # how the reply begins, see chat.THINK
    # Clients such as Open WebUI offer tools with every message; a model may call none, and none is.
    tools: list[object] = []
    tool_choice: typing.Literal["none", "auto"] = "none"
    parallel_tool_calls: object = None


class CompletionRequest(Generation):
    """/v1/completions"""

    prompt: Text | list[Text] | list[int] | list[list[int]]
    logprobs: typing.Annotated[int, Field(ge=0, le=1)] | None = None
    echo: bool = False
    best_of: typing.Literal[1] = 1
    suffix: typing.Literal[""] = ""
