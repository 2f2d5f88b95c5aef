"""Whatever becomes of the kernels, training goes on to the same losses: their references do the work.

Kernels are made-up ones here, which raise or write what is no number wherever they are called.
"""

import types
from dataclasses import replace

import pytest
import torch

import kernel_families
from adder.kernels import dropout, families, fp8, lm_head_loss, rmsnorm, rope, swiglu, triton_utils
from adder.kernels.fused_lora import attach
from adder.kernels.trials import declared, process
from fused_lora_cases import batch_of, family, step, with_adapter, worst_error
from kernel_families import SHAPES

KERNELS = (
    (rmsnorm, "_rms_norm"),
    (rmsnorm, "_rms_norm_backward"),
    (rope, "_apply_rope"),
    (rope, "_rope_backward"),
    (rope, "_add_lora_and_rope"),
    (swiglu, "_swiglu"),
    (swiglu, "_swiglu_fp8"),
    (swiglu, "_lora_swiglu_fp8"),
    (swiglu, "_swiglu_backward"),
    (dropout, "_dropout_matmul"),
    (dropout, "_dropped"),
    (dropout, "_dropout_matmul_grad_a"),
    (dropout, "_add_dropout_matmul_grad_x"),
    (lm_head_loss, "_cross_entropy"),
    (fp8, "_quantise"),
    (fp8, "_quantise_and_matmul"),
    (fp8, "_add_lora"),
)
# Those that a training step by folded LoRA in 16 bits asks for.
ASKED = ("rmsnorm", "rope", "swiglu", "swiglu_backward", "lm_head_loss", "dropout", "dropout_values")


class MadeUp:
    """In the place of a kernel."""

    def __init__(self, kind: str):
        self.kind = kind

    def __getitem__(self, grid):
        return self

    def __call__(self, *arguments, **options):
        if self.kind != "no_number":
            getattr(kernel_families, self.kind)()
        for argument in arguments:
            if isinstance(argument, torch.Tensor) and argument.is_floating_point():
                argument.data.fill_(torch.nan)


def make_up(monkeypatch, kind: str) -> None:
    """Let all tensors be kernels' work, and these of a kind."""
    monkeypatch.setattr(triton_utils, "INTERPRETED", True)
    monkeypatch.setattr(lm_head_loss, "INTERPRETED", True)
    for module in (rope, swiglu, dropout, fp8):
        monkeypatch.setattr(module, "triton", types.SimpleNamespace(cdiv=lambda a, b: -(-a // b)))
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, MadeUp(kind))


@pytest.fixture(autouse=True)
def _nothing_known(monkeypatch):
    monkeypatch.setattr(declared, "ROWS", 40)
    monkeypatch.setattr(declared, "MANY", 40)
    monkeypatch.setattr(declared, "FEW", 24)
    families.forget()
    yield
    families.forget()


def losses_and_gradients(p: float):
    torch.manual_seed(3)
    model = with_adapter(family("Llama"), lora_dropout=p)
    model.get_base_model().lm_head.weight.requires_grad_(False)
    attach.attach(model)
    model.train()
    return step(model, batch_of(9, 23, 14))


@pytest.mark.parametrize("kind", ["out_of_resources", "compilation_error", "runtime_error", "no_number", "slow"])
def test_a_step_is_the_same_without_kernels_that_fail(monkeypatch, kind):
    expected_loss, expected = losses_and_gradients(0.1)
    # Slow ones are right, so it is the references that are slowed down for the trial.
    slowed = [_slowed(one) for one in declared.families("lora")] if kind == "slow" else declared.families("lora")
    tried = [one for one in slowed if one.name in ASKED]
    if kind != "slow":
        make_up(monkeypatch, kind)
    tried = [replace(one, lacks=lambda shapes: None) for one in tried]
    verdicts = process.try_one_by_one(tried, {}, SHAPES, "cpu")
    outcome = {"no_number": "wrong", "slow": "slow"}.get(kind, "raised")
    assert {name: verdict.outcome for name, verdict in verdicts.items()} == dict.fromkeys(ASKED, outcome)
    make_up(monkeypatch, "runtime_error")  # so that one that is asked all the same is seen
    loss, gradients = losses_and_gradients(0.1)
    assert loss == pytest.approx(expected_loss, rel=1e-5) and worst_error(gradients, expected) < 1e-4


def _slowed(one):
    def cases(shapes, device):
        for case in one.cases(shapes, device):

            def slow(case=case):
                kernel_families.slow()
                return case.kernel()

            yield case._replace(kernel=slow)

    return replace(one, cases=cases)


def test_made_up_kernels_would_be_seen(monkeypatch):
    make_up(monkeypatch, "runtime_error")
    with pytest.raises(RuntimeError, match="CUBLAS_STATUS_NOT_SUPPORTED"):
        losses_and_gradients(0.0)
