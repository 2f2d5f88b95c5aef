"""Tiny random models of many families, and what transformers' generate replies with them."""

import torch
import transformers

from adder.evaluation.speculative_decoding import Request

SIZES = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": None,
    "eos_token_id": 3,
}
FAMILIES = {
    "Llama": {},
    "Qwen2": {},
    "Qwen3": {"head_dim": 8},
    "Mixtral": {"num_local_experts": 4, "sliding_window": None},
    "Phi3": {},
    "Olmo2": {},
    "GPTNeoX": {},
}
STOPS = list(range(3, 96, 9))  # so many that a random model meets one now and then


def make(family: str, **more):
    torch.manual_seed(1)
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **FAMILIES.get(family, {}), **more})
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval()
    for parameter in model.parameters():  # large enough that the likeliest token is far ahead of the second
        parameter.data *= 3 if parameter.dim() > 1 else 1
    return model


def prompts(count=9, shared=4):
    random = torch.Generator().manual_seed(0)
    lengths = [shared + 1 + (7 * number) % 20 for number in range(count)]
    start = [11, 12, 13, 14, 15, 16, 17][:shared]
    return [start + torch.randint(6, 96, (n - shared,), generator=random).tolist() for n in lengths]


def by_transformers(model, prompt, limit):
    """New tokens through the ending one."""
    config = transformers.GenerationConfig(max_new_tokens=limit, do_sample=False, eos_token_id=STOPS, pad_token_id=0)
    ids = torch.tensor([prompt], device=model.device)
    mask = torch.ones_like(ids)
    return model.generate(input_ids=ids, attention_mask=mask, generation_config=config)[0, len(prompt) :].tolist()


def draft_of(kind, reply, number):
    """A draft at a reply: none, all of it, all but its end, more than it, wrong from a place on, or any of them."""
    kinds = {
        "none": [],
        "right": reply,
        "short": reply[:-2],
        "long": [*reply, 7, 8],
        "wrong": [*reply[: number % 4], 90, *reply[number % 4 :]],
    }
    return kinds[kind] if kind != "mixed" else kinds[list(kinds)[number % 5]]


def requests_with_drafts(model, asked, draft, limit):
    """What generate replies to each of the prompts, and a request for it with that kind of draft."""
    expected = [by_transformers(model, prompt, limit) for prompt in asked]
    requests = [
        Request(prompt + draft_of(draft, reply, number), len(prompt))
        for number, (prompt, reply) in enumerate(zip(asked, expected, strict=True))
    ]
    return expected, requests
