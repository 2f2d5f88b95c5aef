"""Whether prompts hold all that a conversation says."""

import pytest

from adder.tokenization.chat_template import ChatTemplate, UnusableRow
from adder.tokenization.prompt_contents import PromptContents
from chat_families import TOOLS
from conversation_cases import user
from tiny import tiny_tokenizer


def checked(change: tuple[str, str], messages, tools=None) -> PromptContents:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = tokenizer.chat_template.replace(*change)
    template = ChatTemplate(tokenizer)
    contents = PromptContents(template)
    contents.check(messages, tools, template.render(messages, prompt=True, tools=tools))
    return contents


def test_a_message_whose_text_occurs_elsewhere_is_missed_all_the_same():
    messages = [user("yes"), {"role": "assistant", "content": "yes"}, user("yes")]
    with pytest.raises(UnusableRow, match=r"leaves out a message \(user\)"):
        checked(("{% for message in messages %}", "{% for message in messages[1:] %}"), messages)
    checked(("", ""), messages)


def test_a_message_that_is_rewritten_is_refused():
    with pytest.raises(UnusableRow, match=r"rewrites message 1 \(user\)"):
        checked(("message['content']", "(message['content'] | replace('e', '3'))"), [user("where?")])


def test_what_a_template_leaves_out_of_tools_is_told():
    names = "{% for tool in tools or [] %}{{ tool.function.name }}{% endfor %}{% for message in messages %}"
    contents = checked(("{% for message in messages %}", names), [user("Rain?")], TOOLS)
    assert contents.unwritten_of_tools == {"descriptions", "names of arguments", "descriptions of arguments"}
    whole = "{{ tools | tojson }}{% for message in messages %}"
    assert checked(("{% for message in messages %}", whole), [user("Rain?")], TOOLS).unwritten_of_tools == set()
