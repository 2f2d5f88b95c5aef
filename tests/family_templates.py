"""Small chat templates of our own, each with one habit of a family that TRL ships no template of."""

# The system prompt stands before the last question, and only while that is the last message: nowhere, once replied to.
MISTRAL_V03 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set system = messages[0]['content'] %}{%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'user' and loop.last and system is defined %}
        {{- '[INST] ' + system + '\\n\\n' + message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'user' %}{{- '[INST] ' + message['content'] + '[/INST]' }}
    {%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}
    {%- else %}{{- raise_exception('no role ' + message['role']) }}{%- endif %}
{%- endfor %}"""

# A tool's result ends in one newline more once something follows it.
HERMES = """\
{{- bos_token }}
{%- if tools %}{{- '<|im_start|>system\\nTools: ' + tools | tojson + '<|im_end|>\\n' }}{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'tool' %}
        {{- '<|im_start|>tool\\n<tool_response>\\n' + message.content }}
        {{- '\\n</tool_response>' + ('' if loop.last else '\\n') + '<|im_end|>' }}
    {%- elif message.tool_calls %}
        {{- '<|im_start|>assistant\\n' + message.content }}
        {%- for call in message.tool_calls %}
            {{- '<tool_call>\\n{"name": "' + call.function.name + '", "arguments": ' }}
            {{- call.function.arguments | tojson + '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
    {%- else %}{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# The prompt closes the block of reasoning, or opens it where that is asked for; what a reply had in it is dropped.
DEEPSEEK_V31 = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{{- message.content }}{%- endif %}
    {%- if message.role == 'user' %}{{- '<｜User｜>' + message.content }}{%- endif %}
    {%- if message.role == 'assistant' %}
        {{- '<｜Assistant｜></think>' + message.content.split('</think>', 1)[-1] + eos_token }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<｜Assistant｜>' + ('<think>' if thinking is defined and thinking else '</think>') }}
{%- endif %}"""

# An empty channel of thoughts in the prompt, which a finished conversation lacks; results in several parts.
GEMMA4_LARGE = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {%- if role != 'tool' %}{{- '<|turn>' + role + '\\n' }}
        {%- if message.reasoning %}{{- '<|channel>thought\\n' + message.reasoning + '\\n<channel|>' }}{%- endif %}
        {{- message.content | trim + '<turn|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|turn>model\\n' }}
    {%- if not (enable_thinking is defined and enable_thinking) %}{{- '<|channel>thought\\n<channel|>' }}{%- endif %}
{%- endif %}"""

# Reasoning between marks that are control tokens, which decoding drops.
MAGISTRAL = """\
{{- bos_token }}
{%- for message in messages %}
    {%- if message.role == 'system' %}{{- '[SYSTEM_PROMPT]' + message.content + '[/SYSTEM_PROMPT]' }}
    {%- elif message.role == 'user' %}{{- '[INST]' + message.content + '[/INST]' }}
    {%- else %}
        {%- if message.reasoning_content %}{{- '[THINK]' + message.reasoning_content + '[/THINK]' }}{%- endif %}
        {{- message.content + eos_token }}
    {%- endif %}
{%- endfor %}"""

# Results are read as a list, of a text letter by letter.
COMMAND_A = """\
{{- bos_token }}
{%- if tools %}{{- '<|START_OF_TURN_TOKEN|>' + tools | tojson + '<|END_OF_TURN_TOKEN|>' }}{%- endif %}
{%- for message in messages %}
    {{- '<|START_OF_TURN_TOKEN|>' + message.role + ': ' }}
    {%- if message.role == 'tool' %}
        {%- for part in message.content %}{{- '{"' + loop.index0 | string + '": ' + part | tojson + '}' }}{%- endfor %}
    {%- elif message.tool_calls %}{{- message.content + '<|START_ACTION|>' + message.tool_calls | tojson }}
        {{- '<|END_ACTION|>' }}
    {%- else %}{{- message.content }}{%- endif %}
    {{- '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|START_OF_TURN_TOKEN|>assistant: ' }}{%- endif %}"""

# The prompt closes a block of thoughts, which a finished conversation has of calls only; results are escaped.
COMMAND_R7B = """\
{{- bos_token }}
{%- if tools %}{{- '<|START_OF_TURN_TOKEN|>' + tools | tojson + '<|END_OF_TURN_TOKEN|>' }}{%- endif %}
{%- for message in messages %}
    {{- '<|START_OF_TURN_TOKEN|>' + message.role + ': ' }}
    {%- if message.role == 'tool' %}{{- [message.content] | tojson }}
    {%- elif message.tool_calls %}{{- '<|START_THINKING|>' + (message.reasoning_content or '') + '<|END_THINKING|>' }}
        {{- '<|START_ACTION|>' + message.tool_calls | tojson + '<|END_ACTION|>' }}
    {%- elif message.role == 'assistant' %}{{- '<|START_RESPONSE|>' + message.content + '<|END_RESPONSE|>' }}
    {%- else %}{{- message.content }}{%- endif %}
    {{- '<|END_OF_TURN_TOKEN|>' }}
{%- endfor %}
{{- '<|START_OF_TURN_TOKEN|>assistant: <|START_THINKING|>' }}
{%- if not enable_thinking %}{{- '<|END_THINKING|>' }}{%- endif %}"""

# Turns between ordinary words; only what ends a reply is a control token.
MISTRAL_V01 = """\
{{- bos_token }}
{%- if messages[0]['role'] == 'system' %}
    {%- set first = messages[0]['content'] + '\\n\\n' %}{%- set messages = messages[1:] %}
{%- endif %}
{%- for message in messages %}
    {%- if message['role'] == 'user' %}
        {{- ' [INST] ' + (first if loop.first and first else '') + message['content'] + ' [/INST]' }}
    {%- elif message['role'] == 'assistant' %}{{- ' ' + message['content'] + eos_token }}
    {%- else %}{{- raise_exception('no role ' + message['role']) }}{%- endif %}
{%- endfor %}"""

# The same, on lines of their own, and no newline behind the last reply.
OLMO_2 = """\
{{- bos_token }}
{%- for message in messages %}
    {{- '<|' + message['role'] + '|>\\n' + message['content'] }}
    {%- if message['role'] == 'assistant' %}{{- eos_token }}{%- endif %}
    {{- '' if loop.last and message['role'] == 'assistant' else '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""

# The next turn's opener stands behind every finished conversation.
OPENS_ALWAYS = """\
{%- for message in messages %}{{- '<|' + message.role + '|>' + message.content + '<|end|>' }}{%- endfor %}
{{- '<|assistant|>' }}"""

# Arguments are written, the list of tools isn't, and a tool's name stands in each call.
DROPS_TOOLS = HERMES.replace("{%- if tools %}", "{%- if false %}")

# A message other than the first system prompt is passed over.
DROPS_SYSTEM = """\
{%- for message in messages %}{%- if message.role != 'system' %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# What looks like control tokens in a template, and is ordinary text in the vocabularies of its family.
WORDS = {MISTRAL_V01: {"[INST]", "[/INST]"}, OLMO_2: {"<|assistant|>"}}
OWN = {
    "Mistral 7B v0.1": MISTRAL_V01,
    "OLMo 2": OLMO_2,
    "Mistral 7B v0.3, Mistral Nemo": MISTRAL_V03,
    "Hermes 2 Pro, Hermes 3": HERMES,
    "DeepSeek V3.1": DEEPSEEK_V31,
    "Gemma 4 (large)": GEMMA4_LARGE,
    "Magistral": MAGISTRAL,
    "Command A, Command R7B": COMMAND_A,
    "Command R7B (tool use), Command A Reasoning": COMMAND_R7B,
}
SHIPPED = {  # by TRL, by the name of its file
    "Llama 3": "llama3",
    "Llama 3.1, 3.2": "llama3_1",
    "Gemma, Gemma 2": "gemma",
    "Gemma 3": "gemma3",
    "Gemma 4 (small)": "gemma4_v5",
    "Qwen2.5": "qwen2_5",
    "Qwen3": "qwen3",
    "Qwen3-2507 Instruct": "qwen3_instruct_2507",
    "Qwen3.5 (thinking)": "qwen3_5_think",
    "Qwen3.5 (not thinking)": "qwen3_5_nothink",
    "gpt-oss": "gptoss",
    "GLM 4.5 to 4.7": "glm4moe",
    "DeepSeek R1 distills": "deepseek_r1_distill",
    "DeepSeek V3": "deepseekv3",
    "Nemotron 3": "nemotron_3_nano",
    "Phi 3": "phi3",
    "Phi 3.5": "phi3_5",
    "LFM2": "lfm2_v2",
    "LFM2.5": "lfm2_2_5",
    "Aya, Command R": "cohere",
    "Command R7B (tiny Aya)": "cohere2",
    "Idefics 3": "idefics3",
    "SmolVLM": "smolvlm",
}
