"""A reply by a process that has nothing but a model's folder, and by the function that it runs."""

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from adder.core.errors import UserError
from adder.core.files import read_json, write_json
from adder.merging import verification
from adder.merging.fresh_process_reply import greedy_reply
from tiny import save_tiny_model


def test_the_reply_is_the_argmax_whatever_the_model_asks_for(tmp_path):
    model_dir = save_tiny_model(tmp_path / "model", initializer_range=0.3)
    path = model_dir / "generation_config.json"
    write_json(path, read_json(path) | {"do_sample": True, "temperature": 9.0, "repetition_penalty": 5.0})
    reply = greedy_reply(str(model_dir), "float32", "cpu", [5, 6, 7], 6)
    model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32)
    ids = [5, 6, 7]
    for token in reply["input_ids"]:
        with torch.no_grad():
            assert int(model(torch.tensor([ids])).logits[0, -1].argmax()) == token
        ids.append(token)
    assert 0 < len(reply["input_ids"]) <= 6
    assert reply["text"] == AutoTokenizer.from_pretrained(model_dir).decode(reply["input_ids"])


def test_another_process_replies_alike(tmp_path):
    model_dir = save_tiny_model(tmp_path / "model")
    reply, dtype = verification.reply_of_fresh_process(model_dir, [5, 6, 7], "cpu")
    assert dtype == "float32"
    assert reply == greedy_reply(str(model_dir), "float32", "cpu", [5, 6, 7], verification.REPLY_TOKENS)


def test_a_model_that_no_fresh_process_can_load_is_refused(tmp_path):
    model = save_tiny_model(tmp_path / "model")
    (model / "config.json").unlink()
    with pytest.raises(UserError, match="a fresh process could not load the merged model"):
        verification.reply_of_fresh_process(model, [5, 6], "cpu")
