"""Which models can be written as GGUF: told by config.json alone, with the reason where one can't."""

from typing import Any

import pytest

from adder.core.errors import UserError
from adder.export.gguf_architectures import ARCHITECTURES, refuse_unsupported

LLAMA = {"architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_architectures_have_llama_cpps_names(name):
    assert refuse_unsupported(LLAMA | {"architectures": [name]}) == ARCHITECTURES[name]


@pytest.mark.parametrize(
    "rope", [None, {"type": "linear", "factor": 2.0}, YARN, YARN | {"beta_fast": 32}, {"rope_type": "llama3"}]
)
def test_the_usual_position_embeddings_are_written(rope):
    assert refuse_unsupported(LLAMA | {"rope_parameters": rope}) == "llama"
    assert refuse_unsupported(LLAMA | {"rope_scaling": rope}) == "llama"  # older files' name for it


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["Gemma3ForCausalLM"]}, "its architecture is Gemma3ForCausalLM; can be: LlamaFor"),
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
