"""Conversations that are written out in one text are told from texts."""

import pytest

from adder.formatting.rejected import Rejected
from adder.formatting.transcripts import is_transcript
from format_stage import read


@pytest.mark.parametrize(
    "text",
    [
        "### Human: hi### Assistant: ho",
        "Below is a task.\n\n### Instruction:\nAdd.\n\n### Input:\n1 1\n\n### Response:\n2",
        "<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nhi [/INST] ho </s>",
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nho<|im_end|>",
        "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\nho<end_of_turn>",
        "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nho",
        "<|user|>\nhi<|end|>\n<|assistant|>\nho<|end|>",
        "USER: hi\n\nASSISTANT: ho",
        "\n\nHuman: hi\n\nAssistant: ho",
    ],
)
def test_a_conversation_in_one_text_is_no_text_to_learn_without_a_word(text):
    assert is_transcript(text)
    with pytest.raises(Rejected, match="conversation written out: `row_format: text` learns all of it"):
        read({"text": text})
    assert read({"text": text}, "text") == {"text": text}


@pytest.mark.parametrize(
    "text",
    [
        "A question: what is it?\nThe user asks. Assistant professors reply.",
        "# User guide\n\nThe assistant: a small program.",
        "Answer: 4\nQuestion: what is 2 + 2?",
        "",
    ],
)
def test_other_texts_are_none(text):
    assert not is_transcript(text)
