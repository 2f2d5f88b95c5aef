"""Small chat templates that each show one real family's habits, and tokenizers to go with them."""

import json
from dataclasses import dataclass

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from adder.core.labels import IGNORE_INDEX
from adder.tokenization.chat_template import NAMED, ChatTemplate, UnusableRow
from tiny import tiny_tokenizer

CHATML_DEFAULT_SYSTEM = """\
{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}{{ '<|im_start|>system
You are helpful.<|im_end|>
' }}{% endif %}{{'<|im_start|>' + message['role'] + '
' + message['content'] + '<|im_end|>' + '
'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant
' }}{% endif %}"""

# Today's date in the system turn, contents trimmed, the next turn right behind the end of turn.
LLAMA3 = """\
{{- bos_token }}
{{- '<|start_header_id|>system<|end_header_id|>\n\nToday: ' + strftime_now('%d %b %Y') + '\n\n' }}
{%- if messages[0]['role'] == 'system' %}
    {{- messages[0]['content'] | trim }}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- '<|eot_id|>' }}
{%- for message in messages %}
    {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""

# The system prompt merged into the first user turn, role "model", strict alternation.
GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set first = messages[0]['content'] + '\n\n' %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set first = '' %}
{%- endif %}
{%- for message in messages %}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}
    {%- endif %}
    {%- set role = 'model' if message['role'] == 'assistant' else message['role'] %}
    {{- '<start_of_turn>' + role + '\n' + (first if loop.first else '') + message['content'] | trim }}
    {{- '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

# No generation prompt; the system prompt goes into the last user turn, so earlier prompts are rewritten later.
MISTRAL = """\
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}
    {%- set messages = messages[1:] %}
{%- endif %}
{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {%- if system is defined and loop.index0 >= messages | length - 2 %}
            {{- '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}
        {%- else %}
            {{- '[INST] ' + message['content'] + '[/INST]' }}
        {%- endif %}
    {%- else %}
        {{- ' ' + message['content'] + eos_token }}
    {%- endif %}
{%- endfor %}"""

# Reasoning is kept in the last turn only, where an empty block stands if there is none.
QWEN_THINK = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {%- set content = message.content.split('</think>')[-1].lstrip('\n') %}
        {{- '<|im_start|>assistant\n' }}
        {%- if loop.last %}
            {%- set thought = message.content.split('</think>')[0].split('<think>')[-1] %}
            {{- '<think>\n' + (thought if '</think>' in message.content else '').strip('\n') + '\n</think>\n\n' }}
        {%- endif %}
        {{- content + '<|im_end|>\n' }}
    {%- else %}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

# Generation blocks that leave the end of turn out.
MARKED_BARE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- message.content }}{%- endgeneration %}
    {%- else %}{{- message.content }}{%- endif %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

# Generation blocks that take in the prompt's newline before the reply and the one after its end (Qwen 2.5 in TRL).
MARKED_WIDE = """\
{%- for message in messages %}
    {{- '<|im_start|>' + message.role }}
    {%- if message.role == 'assistant' %}
        {%- generation %}{{- '\n' + message.content + '<|im_end|>\n' }}{%- endgeneration %}
    {%- else %}{{- '\n' + message.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{% endif %}"""

# Two control tokens end a turn (Command R7B).
COHERE = """\
{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}\
{{ '<|start|><|chatbot|><|resp|>' + message.content + '<|end_resp|><|end_turn|>' }}\
{% else %}{{ '<|start|><|' + message.role + '|>' + message.content + '<|end_turn|>' }}{% endif %}{% endfor %}\
{% if add_generation_prompt %}{{ '<|start|><|chatbot|><|resp|>' }}{% endif %}"""

# An end-of-text token after the last turn only, behind a newline (Phi 3.5).
PHI = """\
{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""

# No control token before a reply, and a space that the tokenizer joins to its first word (Vicuna).
VICUNA = """\
{{ bos_token }}{% for message in messages %}{% if message.role == 'assistant' %}\
{{ ' ASSISTANT: ' + message.content + eos_token }}{% else %}{{ message.role | upper + ': ' + message.content }}\
{% endif %}{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT: ' }}{% endif %}"""

# Roles named in ordinary text; only the end of a turn is a control token (Zephyr).
ZEPHYR = """\
{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

# A role between two control tokens, a reply right behind (Granite).
GRANITE = """\
{%- for message in messages %}
    {{- '<|start_of_role|>' + message['role'] + '<|end_of_role|>' + message['content'] + '<|end_of_text|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_of_role|>assistant<|end_of_role|>' }}{% endif %}"""

# System prompts before all turns, wherever they stand; nothing after a user's turn (DeepSeek V3).
DEEPSEEK = """\
{{- bos_token }}
{%- for message in messages if message['role'] == 'system' %}{{- message['content'] }}{% endfor %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}{{- '<｜User｜>' + message['content'] }}{% endif %}
    {%- if message['role'] == 'assistant' %}{{- '<｜Assistant｜>' + message['content'] + eos_token }}{% endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<｜Assistant｜>' }}{% endif %}"""

# The next turn's role ends a reply (ChatGLM): nothing that the template writes does.
CHATGLM = """\
[gMASK]<sop>{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"""

# An end-of-text token after the last turn only.
EOS_LAST = """\
{% for message in messages %}{{ message['role'] | capitalize + ': ' + message['content'] + '\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ 'Assistant: ' }}{% else %}{{ eos_token }}{% endif %}"""

# Tools before the last user turn, calls as JSON, and ids of nine letters or digits (Mistral 7B v0.3).
MISTRAL_TOOLS = """\
{{- bos_token }}
{%- set users = messages | selectattr('role', 'equalto', 'user') | list %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {%- if tools and message == users[-1] %}
            {{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}
        {%- endif %}
        {{- '[INST] ' + message['content'] + '[/INST]' }}
    {%- elif message.tool_calls %}
        {{- '[TOOL_CALLS] [' }}
        {%- for call in message.tool_calls %}
            {%- if call.id is not defined or call.id | length != 9 %}
                {{- raise_exception('Tool call IDs should be alphanumeric strings with length 9!') }}
            {%- endif %}
            {{- '{"name": "' + call.function.name + '", "arguments": ' + call.function.arguments | tojson }}
            {{- ', "id": "' + call.id + '"}' + (']' if loop.last else ', ') }}
        {%- endfor %}
        {{- eos_token }}
    {%- elif message['role'] == 'tool' %}
        {{- '[TOOL_RESULTS] {"content": ' + message['content'] | tojson + '}[/TOOL_RESULTS]' }}
    {%- else %}{{- ' ' + message['content'] + eos_token }}{% endif %}
{%- endfor %}"""

# A space before each content, which the tokenizer joins to its first word.
SPACED = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + ': ' + message['content'] + '<|im_end|>' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant: ' }}{% endif %}"""

# Contents as lists of parts, as vision models' templates have them (SmolVLM).
PARTS = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}{% for part in message['content'] %}\
{% if part['type'] == 'text' %}{{ part['text'] }}{% else %}{{ '<image>' }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}\
{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "get_weather",
            "description": "The weather of a city",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"type": "string", "description": "Its name"},
                    "days": {"type": "integer", "description": "How many"},
                },
                "required": ["city"],
            },
        },
    }
]


@dataclass(frozen=True)
class Family:
    """A template, the control tokens that it needs, and what it does to a reply's text."""

    template: str
    tokens: tuple[str, ...] = ()
    bos: str = "<|endoftext|>"
    eos: str = "<|im_end|>"
    end: str = "<|im_end|>"  # what ends each reply in the labelled text
    last_end: str | None = None  # the same for the last reply, where it differs
    trims: bool = False
    before: str = ""  # what the model writes between the prompt and the reply
    rewrites: bool = False  # whether a later turn changes how earlier ones are written

    def tokenizer(self) -> PreTrainedTokenizerFast:
        tokenizer = tiny_tokenizer(self.template)
        tokenizer.add_special_tokens({"extra_special_tokens": list(self.tokens)})
        tokenizer.bos_token, tokenizer.eos_token = self.bos, self.eos
        return tokenizer


FAMILIES = {
    "chatml": Family(CHATML_DEFAULT_SYSTEM),
    "llama3": Family(
        LLAMA3, ("<|bot|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
        bos="<|bot|>", eos="<|eot_id|>", end="<|eot_id|>", trims=True,
    ),
    "gemma": Family(
        GEMMA, ("<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>"),
        bos="<bos>", eos="<eos>", end="<end_of_turn>", trims=True,
    ),
    "mistral": Family(
        MISTRAL, ("<s>", "</s>", "[INST]", "[/INST]"), bos="<s>", eos="</s>", end="</s>", before=" ", rewrites=True
    ),
    "qwen_think": Family(QWEN_THINK, rewrites=True),
    "marked_bare": Family(MARKED_BARE),
    "marked_wide": Family(MARKED_WIDE),
    "cohere": Family(
        COHERE,
        ("<|start|>", "<|chatbot|>", "<|user|>", "<|system|>", "<|resp|>", "<|end_resp|>", "<|end_turn|>"),
        eos="<|end_turn|>", end="<|end_resp|><|end_turn|>",
    ),
    "phi": Family(PHI, ("<|user|>", "<|system|>", "<|assistant|>", "<|end|>"), eos="<|endoftext|>", end="<|end|>"),
    "vicuna": Family(VICUNA, ("</s>",), eos="</s>", end="</s>"),
    "zephyr": Family(ZEPHYR, ("</s>",), eos="</s>", end="</s>"),
    "granite": Family(
        GRANITE, ("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        eos="<|end_of_text|>", end="<|end_of_text|>",
    ),
    "deepseek": Family(
        DEEPSEEK, ("<｜begin｜>", "<｜end｜>", "<｜User｜>", "<｜Assistant｜>"),
        bos="<｜begin｜>", eos="<｜end｜>", end="<｜end｜>",
    ),
    "parts": Family(PARTS),
    "plain": Family(NAMED["plain"], eos="<|endoftext|>", end="<|endoftext|>"),
}  # fmt: skip


def sentencepiece_like_tokenizer(chat_template: str) -> PreTrainedTokenizerFast:
    """A Llama-2-like tokenizer: a space before the first word, words that begin with one, bytes for what is unknown."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>"]
    alphabet = [chr(code) for code in range(33, 127)] + ["▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(["Yes it is. No it is not. ASSISTANT: USER: Why? Where is the kettle?"] * 4, trainer)
    # The byte tokens were only reserved as special ones; as ordinary vocabulary they are not matched in the text.
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["content"] in special]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        bos_token="<s>", eos_token="</s>", unk_token="<unk>",
    )  # fmt: skip
    fast.chat_template = chat_template
    return fast


def lacking_bytes(chat_template: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer without the byte that é begins with, which it therefore drops without a word."""
    tokenizer = tiny_tokenizer(chat_template)
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    del state["model"]["vocab"]["Ã"]
    tokens = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
    lacking = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(json.dumps(state)), **tokens)
    lacking.chat_template = chat_template
    return lacking


def bos_adding(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    """The tokenizer with its BOS before every text, as Llama's puts it."""
    bos = tokenizer.bos_token
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.bos_token_id)]
    )
    return tokenizer


def rstrip_tokenizer(chat_template: str, token: str) -> PreTrainedTokenizerFast:
    """The tiny tokenizer with one control token that swallows the white space behind it, as Phi 3's do."""
    tokenizer = tiny_tokenizer(chat_template)
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken(token, rstrip=True, special=True)]})
    return tokenizer


def conversation(*contents, system=None):
    """Contents in turn, the user's first."""
    roles = ("user", "assistant")
    turns = [{"role": roles[number % 2], "content": content} for number, content in enumerate(contents)]
    return ([{"role": "system", "content": system}] if system else []) + turns


def call(city, name="get_weather", number=1):
    """A tool call."""
    function = {"name": name, "arguments": {"city": city, "days": 2}}
    return {"type": "function", "id": f"call{number:05}", "function": function}


def result(content, name="get_weather", number=1):
    """What a tool call came to."""
    return {"role": "tool", "content": content, "tool_call_id": f"call{number:05}", "name": name}


def label(labeller, messages, tools=None):
    """Ids, labels and reply lengths of one conversation, or the reason why it can't be used."""
    found = label_all(labeller, messages, tools)
    return found if isinstance(found, str) else (found[0].ids, found[0].labels, found[0].replies)


def label_all(labeller, messages, tools=None):
    """All examples of one conversation, the conversation itself first, or the reason why it can't be used."""
    conversation = {"messages": messages, "tools": tools} if tools else {"messages": messages}
    found = labeller.label([conversation])[0]
    return str(found) if isinstance(found, UnusableRow) else found


def labelled_text(tokenizer, labels):
    return tokenizer.decode(labels[labels != IGNORE_INDEX], clean_up_tokenization_spaces=False)


def prompt_ids(tokenizer, messages, tools=None):
    """What apply_chat_template gives a model to go on from; messages in the form that the template takes."""
    taken = [ChatTemplate(tokenizer).taken(message) for message in messages]
    return tokenizer.apply_chat_template(taken, tools=tools, add_generation_prompt=True, return_dict=False)
