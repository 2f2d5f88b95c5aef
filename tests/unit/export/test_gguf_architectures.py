"""Which models can be written as GGUF: told by config.json alone, with the reason where one can't."""

from typing import Any

import gguf
import pytest

from adder.core.errors import UserError
from adder.export.gguf_architectures import ARCHITECTURES, refuse_unsupported

LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_architectures_have_llama_cpps_names(name):
    found = ARCHITECTURES[name]
    own = {"num_hidden_layers": 26, "num_attention_heads": 8, "hidden_size": 2304, "norm_topk_prob": "3Moe" in name}
    assert refuse_unsupported(LLAMA | own | {"architectures": [name], "hidden_act": found.activation}) is found
    assert found.name in gguf.MODEL_ARCH_NAMES.values()


@pytest.mark.parametrize(
    "rope", [None, {"type": "linear", "factor": 2.0}, YARN, YARN | {"beta_fast": 32}, {"rope_type": "llama3"}]
)
def test_the_usual_position_embeddings_are_written(rope):
    assert refuse_unsupported(LLAMA | {"rope_parameters": rope}).name == "llama"
    assert refuse_unsupported(LLAMA | {"rope_scaling": rope}).name == "llama"  # older files' name for it


GEMMA = {"hidden_act": None, "hidden_activation": "gelu_pytorch_tanh", "num_hidden_layers": 12}
GEMMA |= {"architectures": ["Gemma3ForCausalLM"], "head_dim": 256, "query_pre_attn_scalar": 256}
WINDOWS = {"layer_types": ["sliding_attention", "full_attention"] * 6}


def test_gemma_3_is_told_by_its_text_part_too():
    outer = {"architectures": ["Gemma3ForConditionalGeneration"], "text_config": GEMMA | {"architectures": None}}
    assert refuse_unsupported(GEMMA).name == refuse_unsupported(outer).name == "gemma3"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (GEMMA | WINDOWS, "its layers with sliding windows aren't all but each 6th"),
        (GEMMA | {"query_pre_attn_scalar": 168}, "scaled by query_pre_attn_scalar 168, not 256"),
        (GEMMA | {"rope_local_base_freq": 5e4}, "has the base 50000, llama.cpp's 10,000"),
        (GEMMA | {"final_logit_softcapping": 30.0}, "final_logit_softcapping, which llama.cpp's gemma3 hasn't"),
        ({"architectures": ["Qwen2MoeForCausalLM"], "norm_topk_prob": True}, "its router's weights are normed"),
        ({"architectures": ["Qwen3MoeForCausalLM"]}, "its router's weights aren't normed"),
        ({"architectures": ["Qwen2MoeForCausalLM"], "mlp_only_layers": [0]}, "some of its layers have no experts"),
        (
            {"architectures": ["SmolLM3ForCausalLM"], "num_hidden_layers": 4, "no_rope_layers": [1, 1, 1, 1]},
            "its layers without a position embedding aren't each 4th",
        ),
        ({"architectures": ["Phi3ForCausalLM"], "rope_scaling": {"type": "longrope"}}, "is scaled by 'longrope'"),
    ],
)
def test_what_llama_cpp_has_compiled_in_otherwise_is_refused(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=message):
        refuse_unsupported(LLAMA | changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "its architecture is GPT2LMHeadModel; can be: LlamaFor"),
        ({"architectures": None, "model_type": "mamba"}, "its architecture is mamba"),
        ({"hidden_act": "gelu"}, "its layers use gelu, llama.cpp's use silu"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "position embedding is scaled by 'dynamic'; can be: default, "),
        ({"rope_parameters": YARN | {"beta_fast": 16}}, "its YaRN scaling has beta_fast: 16; only the usual 32 can be"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "only a part of each head"),
    ],
)
def test_other_models_are_refused_with_the_reason(changes: dict[str, Any], message: str):
    with pytest.raises(UserError, match=f"export.gguf: this model can't be written as GGUF: .*{message}"):
        refuse_unsupported(LLAMA | changes)
