"""Packs as training reads them."""

from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from adder.training import lora
from adder.training.packed_dataset import PackedExamples
from gradient_cases import collate, gradients_of, relative_error
from lengths_stage import examples_of, pack
from tiny import pack_rows, token_row
from training_stage import small_settings


def test_refilled_packs_keep_their_shape_and_every_example(tmp_path):
    lengths = np.random.default_rng(1).integers(20, 60, 300)
    found = pack(tmp_path, lengths)
    rows, first = found.rows, found.packs
    packs = PackedExamples(found.tokens, found.out / "packs.parquet", 0, True)
    seen = {}
    for epoch in (0, 1, 2, 1):
        packs.start_epoch(epoch)
        made = [packs.pack(number) for number in range(len(packs.seq_lengths))]
        assert [pack["seq_lengths"].tolist() for pack in made] == [pack["seq_lengths"].tolist() for pack in first]
        order = examples_of(rows, made)
        assert sorted(order) == list(range(300))
        assert seen.setdefault(epoch, order) == order  # an epoch that is started again is the same
    assert seen[0] == examples_of(rows, first) and seen[0] != seen[1] != seen[2]


def test_the_longest_example_is_found_among_all_packs(tmp_path):
    lengths = np.random.default_rng(2).integers(20, 60, 40)
    lengths[17] = 75
    found = pack(tmp_path, lengths)
    packs = PackedExamples(found.tokens, found.out / "packs.parquet", 0, False)
    longest = packs.longest_example()
    assert len(longest) == 75 and longest.tolist() == list(found.rows[17]["input_ids"])


def load(folder: Path, attention: str):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=attention)


def test_packed_examples_do_not_see_each_other(tiny_model_dir):
    """Loss and gradients of a pack are those of its examples one by one (fp32: sums in another order, 1e-5)."""
    rows = [token_row(i, length) for i, length in enumerate((9, 23, 14, 5))]
    model = load(tiny_model_dir, "adder_segments")
    packed = gradients_of(model, [collate(pack_rows([rows]))])
    single = gradients_of(model, [collate(pack_rows([[row]])) for row in rows])
    assert relative_error(packed, single) < 1e-5
    two_packs = gradients_of(model, [collate(pack_rows([rows[:2], rows[2:]]))])
    assert relative_error(two_packs, single) < 1e-5


def test_packed_examples_see_each_other_with_a_cache(tiny_model_dir):
    """The trap that use_cache=False avoids is real: where this fails, transformers has mended it."""
    rows = [token_row(i, length) for i, length in enumerate((9, 23, 14))]
    batch = collate(pack_rows([rows]))
    model = load(tiny_model_dir, "sdpa").eval()
    plain = {name: batch[name] for name in ("input_ids", "position_ids")}
    isolated = model(**plain, use_cache=False).logits
    assert relative_error(model(**plain, use_cache=True).logits, isolated) > 1e-2


def test_loss_and_gradients_on_the_real_model(embedded_model_dir):
    """Packed = unpacked where behaviour matters: 30 layers, 9 heads over 3 key-value heads (fp32, 1e-4)."""
    rows = [token_row(i, length, vocabulary=40_000) for i, length in enumerate((12, 40, 25))]
    model = load(embedded_model_dir, "adder_segments")
    model = lora.add_adapter(model, small_settings(lora_dropout=0.0))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    packed = gradients_of(model, [collate(pack_rows([rows]))])
    single = gradients_of(model, [collate(pack_rows([[row]])) for row in rows])
    assert relative_error(packed, single) < 1e-4
