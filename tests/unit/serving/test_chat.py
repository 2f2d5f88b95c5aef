"""Talking to tiny models: the replies that the evaluation would get, and commands."""

import io
import json

import pytest
import torch

from adder.core import precision
from adder.core.display.text import printable
from adder.core.errors import UserError
from adder.evaluation.model_loading import load_model
from adder.evaluation.reply_text import ReplyReader
from adder.serving.chat import Settings, open_chat, talk
from adder.serving.run_models import RunModels
from adder.tokenization.chat_template import ChatTemplate
from tiny import save_tiny_model, tiny_tokenizer

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {}}}]
WITH_TOOLS = (
    "{% if tools %}TOOLS {{ tools[0].function.name }}\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    varied = {
        "tie_word_embeddings": False,
        "initializer_range": 0.3,
    }  # so that replies aren't one token again and again
    tuned = save_tiny_model(folder / "tuned", seed=1, chat_template=WITH_TOOLS, **varied)
    return RunModels(tuned, save_tiny_model(folder / "base", **varied), "Be brief.")


def opened(models, which="tuned", **settings):
    return open_chat(models, which, Settings(max_new_tokens=12, **settings), io.StringIO())


def said(chat, *lines):
    chat.out = io.StringIO()
    for line in lines:
        assert chat.take(line)
    return chat.out.getvalue()


def greedy(folder, messages, limit):
    """The likeliest token each time, by forward passes over the whole text."""
    tokenizer = tiny_tokenizer(WITH_TOOLS)
    model = load_model(folder, precision.compute_dtype("cpu").value, "cpu")
    ids = tokenizer(ChatTemplate(tokenizer).render(messages, prompt=True), add_special_tokens=False)["input_ids"]
    start = len(ids)
    while len(ids) == start or (len(ids) < start + limit and ids[-1] != tokenizer.eos_token_id):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ReplyReader(tokenizer).text(ids[start:], {tokenizer.eos_token_id})


def test_a_reply_is_the_greedy_one_to_the_conversation_so_far(models):
    chat = opened(models)
    system, first = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Where is the parcel?"}
    wanted = greedy(models.tuned, [system, first], 12)
    assert said(chat, "Where is the parcel?").startswith(printable(wanted))
    answer = {"role": "assistant", "content": ReplyReader(chat.tokenizer).answer(wanted)}
    assert chat.speakers[0].messages == [system, first, answer]
    wanted = greedy(models.tuned, [system, first, answer, {"role": "user", "content": "And now?"}], 12)
    assert said(chat, "And now?").startswith(printable(wanted))


def test_both_are_asked_alike_and_keep_their_own_replies(models):
    chat = opened(models, "both")
    text = said(chat, "Hello")
    assert text.index("base:") < text.index("tuned:")
    base, tuned = (speaker.messages for speaker in chat.speakers)
    assert base[:2] == tuned[:2]
    assert base[2] != tuned[2]  # other weights


def test_a_reply_that_is_cut_says_so(models):
    assert "[cut at 12 tokens]" in said(opened(models), "Hello")


def test_the_commands(models, tmp_path):
    chat = opened(models)
    said(chat, "Hello", "/reset")
    assert [message["role"] for message in chat.speakers[0].messages] == ["system"]
    said(chat, "/system Only yes or no.")
    assert chat.speakers[0].messages == [{"role": "system", "content": "Only yes or no."}]
    said(chat, "/system")
    assert chat.speakers[0].messages == []
    (tmp_path / "tools.json").write_text(json.dumps(TOOLS))
    said(chat, f"/tools {tmp_path / 'tools.json'}")
    assert said(chat, "/prompt").startswith("TOOLS weather\n<|im_start|>user\n")
    assert "/tools FILE" in said(chat, "/help")
    assert said(chat, "", "  ") == ""
    assert not chat.take("/quit")


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("/sytem x", "no such command"),
        ("/tools /nowhere.json", "can't be read as JSON"),
        ("word " * 600, "the model takes 512"),
    ],
)
def test_what_cannot_be_done_leaves_the_conversation_as_it_was(models, line, why):
    chat = opened(models)
    before = [dict(message) for message in chat.speakers[0].messages]
    with pytest.raises(UserError, match=why):
        chat.take(line)
    assert chat.speakers[0].messages == before


def test_a_path_is_a_message(models):
    assert said(opened(models), "/usr/bin is where?")


def test_ctrl_c_ends_a_reply_and_not_the_conversation(models, monkeypatch):
    chat = opened(models)

    def interrupted(*args, streamer, **kwargs):
        streamer.put(torch.tensor([[1]]))
        streamer.put(torch.tensor(chat.tokenizer("It is", add_special_tokens=False)["input_ids"]))
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.speakers[0].model, "generate", interrupted)
    assert said(chat, "Hello") == "It is [stopped]\n"
    assert chat.speakers[0].messages[-1] == {"role": "assistant", "content": "It is"}


def test_an_unknown_base_and_a_missing_template_are_refused(models, tmp_path):
    with pytest.raises(UserError, match="isn't known here"):
        opened(RunModels(models.tuned, None, None), "both")
    bare = save_tiny_model(tmp_path / "bare", chat_template=None)
    with pytest.raises(UserError, match="no chat template"):
        opened(RunModels(bare, None, None))


def test_lines_come_until_there_are_none(models, capsys):
    chat = opened(models)
    lines = iter(["/nothing", "/help"])

    def ask():
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    talk(chat, ask, interactive=True)
    assert "no such command" in capsys.readouterr().err
    lines = iter(["/nothing"])
    with pytest.raises(UserError):
        talk(chat, ask, interactive=False)
