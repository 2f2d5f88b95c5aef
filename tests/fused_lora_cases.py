"""Models of each family that fused LoRA serves, a batch for them, and how far two steps are apart."""

import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from adder.kernels import labelled_loss, packed_attention  # noqa: F401 (registers attention over packs)
from adder.kernels.dropout import dropout_mask
from adder.training import base_model
from tiny import pack_rows, token_row

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


SHAPE = {
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 136,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
}


# Name of the family: its configuration, and how many of its two decoder layers are of Llama's kind.
FAMILIES = {
    "Llama": ({}, 2),
    "Mistral": ({}, 2),
    "Qwen2": ({}, 2),
    "Qwen3": ({}, 2),
    "Gemma": ({"hidden_activation": "gelu_pytorch_tanh"}, 2),
    "Gemma2": ({}, 0),
    "Olmo2": ({}, 0),
    "Phi3": ({}, 0),
    "Cohere": ({}, 0),
    "SmolLM3": ({"no_rope_layers": [1, 0]}, 1),
}


def family(name: str, dtype=torch.float32, **changes) -> transformers.PreTrainedModel:
    """A two-layer model of a family, with random weights large enough for each part to show."""
    config = getattr(transformers, f"{name}Config")(**SHAPE | FAMILIES.get(name, ({}, 0))[0] | changes)
    config._attn_implementation = "adder_segments"
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(
                torch.randn_like(parameter) * (0.2 if parameter.ndim == 1 else 1.5 / parameter.shape[1] ** 0.5)
            )
            if parameter.ndim == 1:
                parameter.add_(0.0 if name.startswith("Gemma") else 1.0)
    model.config.use_cache = False
    return model.to(dtype)


def in_nf4(folder) -> transformers.PreTrainedModel:
    """A model whose weights stay packed, as on a GPU."""
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    )
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config, attn_implementation="adder_segments"
    )
    base_model.keep_cpu_weights_intact(model)
    return model


def with_adapter(model, seed: int = 1, **changes) -> PeftModel:
    """LoRA pairs on all projections, B not zero, so that every gradient has something to go by."""
    modules = {name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
    options = {"r": 4, "lora_alpha": 12, "target_modules": sorted(modules - {"lm_head"}), "lora_dropout": 0.0}
    model = get_peft_model(model, LoraConfig(**options | changes, task_type="CAUSAL_LM"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


def batch_of(*lengths: int, device: str = "cpu") -> dict:
    rows = [token_row(i, length) for i, length in enumerate(lengths)]
    batch = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)(pack_rows([rows]))
    return {name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}


def step(model, *batches: dict) -> tuple[float, dict[str, torch.Tensor]]:
    """Summed loss over the batches, and every LoRA gradient by name."""
    model.zero_grad()
    total = 0.0
    for batch in batches:
        value = labelled_loss.labelled_losses(model.get_base_model(), **batch).sum()
        value.backward()
        total += value.item()
    return total, {name: p.grad.float().clone() for name, p in model.named_parameters() if p.grad is not None}


def worst_error(found: dict, expected: dict) -> float:
    assert found.keys() == expected.keys()
    return max(((found[name] - grad).norm() / grad.norm()).item() for name, grad in expected.items())


WIDER = {
    "hidden_size": 512,
    "intermediate_size": 1416,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "head_dim": 64,
}


LENGTHS = (9, 130, 64, 5, 257)


def off(found: torch.Tensor, expected: torch.Tensor) -> float:
    assert found.shape == expected.shape
    return ((found.float() - expected.float()).norm() / expected.float().norm()).item()


def on_gpu(name: str, dtype: torch.dtype, attention: str, adapter: dict | None = None, **changes) -> PeftModel:
    """A family's model with 16-bit weights' values in `dtype`, adapter in fp32."""
    values = torch.bfloat16 if dtype == torch.float32 else dtype
    model = family(name, values, **WIDER | changes).to(dtype).cuda()
    model.set_attn_implementation(attention)
    return with_adapter(model, **{"r": 16, "lora_alpha": 32} | (adapter or {})).cuda()


def all_gradients(gradients: dict) -> torch.Tensor:
    return torch.cat([gradients[name].flatten() for name in sorted(gradients)])


def errors(found: tuple, exact: tuple) -> dict[str, float]:
    """Relative errors of a step: of the loss, of all gradients as one vector, and of each projection's."""
    (loss_found, grads), (loss_exact, exact_grads) = found, exact
    result = {"loss": abs(loss_found / loss_exact - 1), "all": off(all_gradients(grads), all_gradients(exact_grads))}
    for name in PROJECTIONS:
        parts = [{k: v for k, v in g.items() if name in k} for g in (grads, exact_grads)]
        if parts[0]:
            result[name] = off(*map(all_gradients, parts))
    return result


def step_loss(model, batch: dict) -> float:
    with torch.no_grad():
        return labelled_loss.labelled_losses(model.get_base_model(), **batch).sum().item()


def autocast_step(model, dtype, *batches):
    with torch.autocast("cuda", dtype):
        return step(model, *batches)


class MaskedDropout(torch.nn.Module):
    """Dropout by dropout_mask, with seeds drawn as the fused path draws them."""

    def __init__(self, p: float, seeds: dict):
        super().__init__()
        self.p, self.seeds = p, seeds

    def forward(self, x):
        rows = x.reshape(-1, x.shape[-1])
        mask = dropout_mask(self.seeds[self], *rows.shape, self.p, x.device)
        return (rows * mask / (1 - self.p)).view(x.shape)


def masked_reference(model, p: float, seed: int) -> PeftModel:
    """PEFT's own layers with the masks that the fused path makes after torch.manual_seed(seed)."""
    torch.manual_seed(seed)
    seeds = {}
    for layer in model.get_base_model().model.layers:
        for parent, names in ((layer.self_attn, PROJECTIONS[:4]), (layer.mlp, PROJECTIONS[4:])):
            for name in names:
                dropout = MaskedDropout(p, seeds)
                seeds[dropout] = int(torch.randint(2**31, ()))
                getattr(parent, name).lora_dropout["default"] = dropout
    return model
