"""A package `vllm` that computes with transformers: vLLM itself needs a GPU."""

from pathlib import Path

VLLM = """
import sys, types, torch
from transformers import AutoModelForCausalLM, AutoTokenizer

class SamplingParams:
    def __init__(self, max_tokens, stop, stop_token_ids, skip_special_tokens, temperature, **options):
        assert temperature == 0 and not skip_special_tokens
        self.most, self.stops = max_tokens, stop_token_ids

def TokensPrompt(prompt_token_ids):
    return prompt_token_ids

class LLM:
    def __init__(self, model, tokenizer, dtype, max_model_len, generation_config, **options):
        assert generation_config == "vllm"
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=getattr(torch, dtype))
        self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        self.llm_engine = types.SimpleNamespace(model_config=types.SimpleNamespace(max_model_len=max_model_len))

    def generate(self, prompts, sampling_params, use_tqdm, lora_request):
        outputs = []
        for ids, options in zip(prompts, sampling_params):
            found = self.model.generate(
                torch.tensor([ids]), attention_mask=torch.ones(1, len(ids)), do_sample=False,
                max_new_tokens=options.most, eos_token_id=options.stops,
            )[0, len(ids):].tolist()
            said = found[:-1] if found[-1] in options.stops else found  # vLLM leaves out the token that it stops on
            reply = types.SimpleNamespace(
                token_ids=found, text=self.tokenizer.decode(said),
                finish_reason="stop" if found[-1] in options.stops else "length",
            )
            outputs.append(types.SimpleNamespace(outputs=[reply]))
        return outputs
"""


def install_stand_in_for_vllm(folder: Path) -> None:
    """A package `vllm` with the names that lm-eval's vLLM model imports, computing with transformers."""
    parts = {
        "vllm/__init__.py": VLLM,
        "vllm/lora/__init__.py": "",
        "vllm/lora/request.py": "LoRARequest = None",
        "vllm/renderers/__init__.py": "",
        "vllm/renderers/hf.py": "def resolve_chat_template(**_): return None",
        "vllm/tokenizers.py": (
            "from transformers import AutoTokenizer\n"
            "def get_tokenizer(name, tokenizer_mode, trust_remote_code, revision, add_bos_token):\n"
            "    return AutoTokenizer.from_pretrained(name)\n"
        ),
        "vllm-0.14.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: vllm\nVersion: 0.14.0\n",
    }
    for name, text in parts.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
