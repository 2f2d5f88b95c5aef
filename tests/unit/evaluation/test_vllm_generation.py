"""lm-eval's model for vLLM, asked through a stand-in for vLLM."""

from transformers import AutoTokenizer

from adder.evaluation import generation, metrics
from vllm_stand_in import install_stand_in_for_vllm


def test_replies_are_counted_by_their_prompts(tmp_path, tiny_model_dir, monkeypatch):
    install_stand_in_for_vllm(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    from adder.evaluation.vllm_generation import VllmReplyModel

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = VllmReplyModel(tiny_model_dir, tiny_model_dir, "float32", [tokenizer.eos_token_id], 512)
    questions = [{"prompt": text, "reference": "Yes."} for text in ("Where is it?", "Is it four?")]
    found = generation.generate(
        model, questions, 5, "<|im_end|>", lambda *texts: metrics.score_reply(["exact_match"], *texts)
    )
    assert len(found) == 2 and all(set(reply) == {"reply", "exact_match"} for reply in found)
    prompts = {tuple(tokenizer(q["prompt"], add_special_tokens=False)["input_ids"]) for q in questions}
    assert model.written.keys() == prompts
    assert all(0 < counts["new_tokens"] <= 5 for counts in model.written.values())
