"""What every Triton kernel needs on cards that are not here: shared memory and spills, by compiling. No GPU, no driver.

    python benchmarks/cards.py [--cards 75 86 gfx942] [--models Llama-3.1-8B] [--ranks 16] [--out FILE]

Triton compiles for any target, and its wheel brings ptxas. The launchers run as they are on CPU tensors; what would
launch a kernel compiles it instead. A row of benchmarks/results/cards.json is one compiled kernel: `kernel`,
`capability` (or AMD's architecture), `shape` (the models for which it is this very kernel), `rank`, `variant`,
`shared_bytes` a block, `registers` and `spilled_bytes` a thread. `digest` is that of the kernels' source without
comments (`source_digest`), by which a test sees that the table is of the kernels as they are.

All of it takes about twenty minutes on one core; `--jobs` shares the cards out among processes.
"""

import argparse
import ast
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import tokenize
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from io import StringIO
from itertools import repeat, zip_longest
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, TypedDict

ROOT = Path(__file__).resolve().parents[1]
KERNELS = ROOT / "workflow_scripts" / "adder" / "kernels"
RESULTS = ROOT / "benchmarks" / "results" / "cards.json"
CARDS = ("75", "80", "86", "89", "90", "100", "120", "gfx942", "gfx1100")
RANKS = (8, 16, 32, 64, 128, 256)
TOKENS = 256


class Allowed(TypedDict):
    """Why a kernel may spill more than others."""

    kernel: str
    capabilities: list[str]
    from_rank: int
    reason: str


EXCEPTIONS: list[Allowed] = [
    {
        "kernel": "_backward_dkdv",
        "capabilities": ["9.0", "10.0"],
        "from_rank": 0,
        "reason": "with heads of 64, the fastest of some thirty tiles on an H100; it spills with window and cap alone",
    }
]


class Model(NamedTuple):
    """The shape of a model that people fine-tune."""

    hidden: int
    mlp: int
    heads: int
    kv_heads: int
    head_size: int
    vocabulary: int
    activation: str = "silu"
    bias: bool = False


# One of each head size, of each activation, with and without biases; whatever they have themselves, attention is
# compiled with window and cap as well.
MODELS = {
    "Llama-3.2-1B": Model(2048, 8192, 32, 8, 64, 128256),
    "StableLM-3B": Model(2560, 6912, 32, 32, 80, 50304),
    "Phi-3.5-mini": Model(3072, 8192, 32, 32, 96, 32064),
    "Llama-3.1-8B": Model(4096, 14336, 32, 8, 128, 128256),
    "Qwen2.5-7B": Model(3584, 18944, 28, 4, 128, 152064, bias=True),
    "Gemma-2-9B": Model(3584, 14336, 16, 8, 256, 256000, "gelu_tanh"),
}
# The ranks that each one's LoRA is compiled for, where not all: head sizes don't matter there.
OWN_RANKS = {"Llama-3.1-8B": (8, 32, 64, 128, 256), "Gemma-2-9B": (16, 256)}
# Whose attention is compiled with window and cap and without; the others' with both, which need most.
WHOLE_ATTENTION = ("Llama-3.2-1B", "Llama-3.1-8B", "Gemma-2-9B")
# Where each candidate of these tiles is compiled too: the card with the least shared memory.
CANDIDATES_ON = "86"


class Row(TypedDict):
    """One compiled kernel."""

    kernel: str
    capability: str
    shape: str
    rank: int | None
    variant: str
    tile: str
    shared_bytes: int
    registers: int
    spilled_bytes: int


class Failure(TypedDict):
    """A kernel that Triton doesn't compile for a card."""

    kernel: str
    capability: str
    shape: str
    rank: int | None
    variant: str
    error: str


def source_digest() -> str:
    """A digest of the kernels (what is marked @jit) and of their tiles, but for comments and docstrings."""
    digest = hashlib.blake2b(digest_size=16)
    for path in sorted(KERNELS.glob("*.py")):
        source = path.read_text()
        body = ast.parse(source).body
        chosen = body if path.name == "tiles.py" else [node for node in body if _is_kernel(node)]
        for node in chosen:
            digest.update(_tokens(ast.get_source_segment(source, node) or "").encode())
    return digest.hexdigest()


def _is_kernel(node: ast.stmt) -> bool:
    decorators = node.decorator_list if isinstance(node, ast.FunctionDef) else []
    return any(isinstance(decorator, ast.Name) and decorator.id == "jit" for decorator in decorators)


def _tokens(source: str) -> str:
    """The tokens of a definition but comments, layout and texts in quotes, which are docstrings here."""
    left_out = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.STRING)
    found = tokenize.generate_tokens(StringIO(source).readline)
    return " ".join(token.string for token in found if token.type not in left_out)


class Card:
    """What Triton asks a driver for, without one."""

    def __init__(self, name: str):
        from triton.backends.compiler import GPUTarget

        amd = name.startswith("gfx")
        wave = 64 if name.startswith("gfx9") else 32
        self.target = GPUTarget("hip", name, wave) if amd else GPUTarget("cuda", int(name), 32)
        self.name = name

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.name  # Triton keeps what it compiled by device

    def get_current_stream(self, device):
        return 0


def resources(kernel: Any) -> tuple[int, int]:
    """(registers, bytes of spills) a thread of a compiled kernel."""
    if "amdgcn" in kernel.asm:
        text = kernel.asm["amdgcn"]
        found = {
            name: int(value) for name, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s+(\d+)", text)
        }
        return found["vgpr_count"], found["private_segment_fixed_size"]
    import triton

    cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout  # fmt: skip
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", text).groups()
    return int(registers), int(stack)


class Compiler:
    """Compiles what the launchers would launch, and notes what it needs."""

    def __init__(self, card: str):
        self.card = card
        self.rows: dict[str, Row] = {}
        self.failures: dict[tuple[str, str], Failure] = {}
        self.shape, self.rank, self.variant = "", None, ""

    def note(self, launched: Any, arguments: Sequence[Any], kernel: Any) -> None:
        """Add a row for a compiled kernel, or its shape to the row that is there."""
        key = kernel.hash
        if key in self.rows:
            shapes = self.rows[key]["shape"].split(", ")
            if self.shape not in shapes:
                self.rows[key]["shape"] = ", ".join([*shapes, self.shape])
            return
        registers, spilled = resources(kernel)
        self.rows[key] = {
            "kernel": launched.__name__,
            "capability": capability(self.card),
            "shape": self.shape,
            "rank": self.rank,
            "variant": self.variant,
            "tile": _tile(launched, arguments, kernel),
            "shared_bytes": kernel.metadata.shared,
            "registers": registers,
            "spilled_bytes": spilled,
        }


def _tile(launched: Any, arguments: Sequence[Any], kernel: Any) -> str:
    """The blocks of a launch, its warps and stages, in words."""
    named = zip(launched.arg_names, arguments, strict=True)
    blocks = [f"{name.removeprefix('BLOCK_')} {value}" for name, value in named if name.startswith("BLOCK_") and value]
    options = kernel.metadata
    return ", ".join([*blocks, f"{options.num_warps} warps", f"{options.num_stages} stages"])


def prepare(card: str) -> Compiler:
    """Let Triton compile for `card` and launch nothing. It can't be undone: for a process of its own."""
    sys.path.insert(0, str(ROOT / "workflow_scripts"))
    import triton.runtime.jit as jit
    from triton.runtime import driver

    from adder.kernels import tiles, triton_utils

    compiler = Compiler(card)
    driver.set_active(Card(card))
    triton_utils.INTERPRETED = True  # kernels do the work of CPU tensors
    tiles.card_of = lambda device: tiles.card_named(card)
    compile_or_launch = jit.JITFunction.run

    def compile_only(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        try:
            kernel = compile_or_launch(self, *arguments, grid=grid, warmup=True, **options)
        except Exception as error:  # the compiler raises what it likes
            key = self.__name__, compiler.variant
            text = " ".join(str(error).split())[-300:]
            where = Failure(kernel=self.__name__, capability=capability(card), shape=compiler.shape, rank=compiler.rank,
                            variant=compiler.variant, error=f"{type(error).__name__}: {text}")  # fmt: skip
            compiler.failures.setdefault(key, where)
            return
        compiler.note(self, arguments, kernel)

    jit.JITFunction.run = compile_only
    return compiler


class Driver:
    """Calls every launcher with a model's shapes, as training and evaluation do on a card."""

    def __init__(self, compiler: Compiler, name: str, ranks: tuple[int, ...]):
        import torch

        from adder.kernels import tiles

        self.compiler, self.model, self.ranks = compiler, MODELS[name], ranks
        self.card = tiles.card_named(compiler.card)
        self.in_fp8, self.multiplies = tiles.may_have_fp8(self.card), tiles.multiplies(self.card)
        self.dtype = torch.bfloat16 if self.multiplies else torch.float16
        self.name = compiler.shape = name

    def some(self, *sizes: int, gap: int = 0, kind: Any = None) -> Any:
        """A tensor; its rows lie `gap` values further apart than they are long."""
        import torch

        return torch.empty(*sizes[:-1], sizes[-1] + gap, dtype=kind or self.dtype)[..., : sizes[-1]]

    def tell(self, *variant: str, rank: int | None = None) -> None:
        """What the rows to come are of."""
        self.compiler.variant, self.compiler.rank = ", ".join(filter(None, variant)), rank

    def all(self) -> None:
        """Call what this card takes."""
        for with_fp8 in (False, True)[: 1 + self.in_fp8]:
            self.tell("fp8" if with_fp8 else "")
            self.rows(with_fp8)
        self.tell()
        self.frozen()
        if not self.multiplies:
            return
        if self.name != "Qwen2.5-7B":  # whose heads are as Llama's
            self.attention()
            self.tell("decoding")
            self.decoding()
        for rank in self.ranks:
            self.lora(rank)
            if self.in_fp8:
                self.lora_in_fp8(rank)

    def rows(self, with_fp8: bool) -> None:
        """Norm, SwiGLU and RoPE."""
        import torch

        from adder.kernels import rmsnorm, rope, swiglu

        model, some = self.model, self.some
        x, grad = some(TOKENS, model.hidden), some(TOKENS, model.hidden, gap=64)
        plus_one = model.activation != "silu"
        rmsnorm.rms_norm_into(x, some(model.hidden), 1e-5, plus_one, grad, with_fp8)
        rstd = some(TOKENS, kind=torch.float32)
        rmsnorm.rms_norm_backward(grad, x, some(model.hidden), rstd, plus_one, x, with_fp8)
        swiglu.swiglu_into(some(TOKENS, 2 * model.mlp), model.activation, some(TOKENS, model.mlp, gap=64), with_fp8)
        if not with_fp8:
            swiglu.swiglu_backward_alone(some(TOKENS, 2 * model.mlp), some(TOKENS, model.mlp, gap=64), model.activation)
        table = some(128, model.head_size)
        query, key = (some(TOKENS, count, model.head_size) for count in (model.heads, model.kv_heads))
        rope.rope_backward((query, key, key), table, table, with_fp8)

    def frozen(self) -> None:
        """RoPE in place, the LM head's loss, dropped values, NF4's, and fp8's."""
        import torch

        from adder.kernels import dropout, fp8, lm_head_loss, nf4, rope

        model, some = self.model, self.some
        table, rotated = some(128, model.head_size), model.heads + model.kv_heads
        qkv = some(TOKENS, (rotated + model.kv_heads) * model.head_size).unflatten(1, (-1, model.head_size))
        rope.apply_rope(qkv[:, :rotated], table, table)
        lm_head_loss.cross_entropy_in_place(some(8, model.vocabulary), torch.zeros(8, dtype=torch.int64))
        dropout.dropped(some(TOKENS, model.mlp, gap=64), 1, 0.05)
        absmax, code = some(model.hidden * 64, kind=torch.float32), some(16, kind=torch.float32)
        state: Any = SimpleNamespace(absmax=absmax, nested=False, code=code, blocksize=64)
        packed = torch.zeros(model.hidden * 2048, dtype=torch.uint8)
        nf4.dequantise_into(packed, state, some(4096, model.hidden, gap=64))
        for columns in (model.hidden, model.mlp, 2 * model.mlp) if self.in_fp8 else ():
            fp8.quantise(some(TOKENS, columns))

    def attention(self) -> None:
        """Attention forward and backward, with and without window and cap; each candidate of its tiles with both."""
        import torch

        from adder.kernels import tiles
        from adder.kernels.packed_attention_triton import PackedAttention

        class Context:
            def save_for_backward(self, *tensors: torch.Tensor) -> None:
                self.saved_tensors = tensors

        def schedule(rows: int, block: int, first_is_longest: bool) -> torch.Tensor:
            return torch.zeros(4, 3, dtype=torch.int32)

        model = self.model
        counts = (model.heads, model.kv_heads, model.kv_heads)
        query, key, value = (self.some(TOKENS, count, model.head_size) for count in counts)
        backward: Any = PackedAttention.backward

        def both_ways(cap: float | None, window: int | None) -> None:
            self.tell("window" if window else "", "cap" if cap else "")
            context: Any = Context()
            out = PackedAttention.forward(context, query, key, value, schedule, 0.1, window, cap)
            getattr(backward, "__wrapped__", backward)(context, torch.empty_like(out))

        whole = self.name in WHOLE_ATTENTION
        for cap, window in ((None, None), (50.0, 4096)) if whole else ((50.0, 4096),):
            both_ways(cap, window)
        default = tiles.attention_tiles(self.card, model.head_size)
        candidates = tiles.attention_candidates(self.card, model.head_size)
        for tried in zip_longest(*candidates) if whole and self.compiler.card == CANDIDATES_ON else ():
            chosen = tiles.AttentionTiles(*(tile or first for tile, first in zip(tried, default, strict=True)))
            tiles.use_attention_tiles(self.card, model.head_size, chosen)
            both_ways(50.0, 4096)
        tiles.use_attention_tiles(self.card, model.head_size, default)

    def decoding(self) -> None:
        """What evaluation generates with."""
        import torch

        from adder.kernels import decode_attention, row_argmax

        model = self.model
        for kind in (self.dtype, torch.float32):
            cache = self.some(4, model.kv_heads, 512, model.head_size, kind=kind)
            query = self.some(4, model.heads, model.head_size, kind=kind)
            decode_attention.decode_attention(query, cache, cache, torch.ones(4, dtype=torch.int32), 0.1)
        cache, new = (self.some(4, model.kv_heads, length, model.head_size) for length in (512, 1))
        decode_attention.store_token(new[:, :, 0], new[:, :, 0], torch.zeros(4, dtype=torch.int64), cache, cache)
        row_argmax.row_argmax(self.some(4, model.vocabulary))

    def lora(self, rank: int) -> None:
        """LoRA in 16 bits, with and without dropout."""
        from adder.kernels import dropout, swiglu

        model, some = self.model, self.some
        gate_up, grad = some(TOKENS, 2 * model.mlp), some(TOKENS, model.mlp, gap=64)
        low, down_a = some(TOKENS, rank, gap=8), some(rank, model.mlp)
        self.tell(rank=rank)
        swiglu.swiglu_backward(gate_up, grad, model.activation, (low, down_a), low, low)
        self.tell("dropout", rank=rank)
        swiglu.swiglu_backward(gate_up, grad, model.activation, (low, down_a), low, low, (1, 0.05))
        dropout.dropout_matmul(grad, down_a, 1, 0.05, low)
        dropout.dropout_matmul_grad_a(low, grad, 1, 0.05)
        dropout.add_dropout_matmul_grad_x(grad, low, down_a, 1, 0.05)

    def lora_in_fp8(self, rank: int) -> None:
        """LoRA beside matmuls in fp8: kernels that add it, and those that quantise its gradients."""
        import torch

        from adder.kernels import fp8, rope, swiglu

        model, some = self.model, self.some
        gate_up, low, down_a = some(TOKENS, 2 * model.mlp), some(TOKENS, rank, gap=8), some(rank, model.mlp)
        rotated = model.heads + model.kv_heads
        qkv, table = (rotated + model.kv_heads) * model.head_size, some(128, model.head_size)
        for biased in (False, True)[: 1 + model.bias]:
            self.tell("fp8", "bias" if biased else "", rank=rank)
            b, biases = some(model.mlp, rank, gap=8), [some(n) if biased else None for n in (2 * model.mlp, qkv)]
            deferred = swiglu.DeferredLora(b, b, biases[0])
            if rank <= swiglu.MAX_FUSED_RANK:
                swiglu.lora_swiglu_fp8(gate_up, model.activation, low, low, deferred, down_a)
                arguments = gate_up, some(TOKENS, model.mlp), model.activation, (low, down_a), low, low, None, deferred
                swiglu.swiglu_backward(*arguments)
            joint = some(TOKENS, 3 * rank), some(qkv, 3 * rank)
            rope.add_lora_and_rope(some(TOKENS, qkv), *joint, biases[1], table, table, model.head_size, rotated)
            x = some(TOKENS, model.hidden)
            fp8.add_lora(x, some(TOKENS, rank), some(model.hidden, rank), x, None)
            fp8.add_lora(gate_up, some(TOKENS, 2 * rank), some(2 * model.mlp, 2 * rank), None, biases[0])
        self.tell("fp8, gate and up", rank=rank)
        fp8.quantise_and_matmul(gate_up, some(TOKENS, kind=torch.float32), some(2 * model.mlp, 2 * rank))


def compiled(card: str, models: list[str], ranks: tuple[int, ...]) -> tuple[list[Row], list[Failure]]:
    """All rows of a card. For a process of its own."""
    compiler = prepare(card)
    for name in models:
        Driver(compiler, name, tuple(rank for rank in OWN_RANKS.get(name, (16,)) if rank in ranks)).all()
        print(f"{card} {name}: {len(compiler.rows)} kernels", file=sys.stderr, flush=True)
    return list(compiler.rows.values()), list(compiler.failures.values())


def write(out: Path, cards: list[str], rows: list[Row], failures: list[Failure]) -> None:
    """Write the table, a kernel a line; rows of other cards stay where they are of the same source and Triton."""
    import triton

    head = {"triton": triton.__version__, "digest": source_digest()}
    known: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {}
    if all(known.get(name) == value for name, value in head.items()):
        kept = [capability(card) for card in CARDS if card not in cards]
        rows = [row for row in known["kernels"] if row["capability"] in kept] + rows
        failures = [row for row in known["failures"] if row["capability"] in kept] + failures
    order = [capability(card) for card in CARDS]
    lines = [f'"{name}": {json.dumps(value)}' for name, value in {**head, "exceptions": EXCEPTIONS}.items()]
    for name, listed in (("kernels", rows), ("failures", failures)):
        ordered = sorted(listed, key=lambda row: order.index(row["capability"]))
        lines.append(f'"{name}": [' + ",".join(f"\n {json.dumps(row)}" for row in ordered) + "\n]")
    out.write_text("{" + ",\n".join(lines) + "}\n")


def capability(card: str) -> str:
    """A card's capability with its dot; AMD's architectures as they are."""
    return card if card.startswith("gfx") else f"{card[:-1]}.{card[-1]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cards", nargs="+", default=list(CARDS))
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--ranks", nargs="+", type=int, default=list(RANKS))
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn"), max_tasks_per_child=1) as pool:
        found = pool.map(compiled, options.cards, repeat(options.models), repeat(tuple(options.ranks)))
        for card, (rows, failures) in zip(options.cards, found, strict=True):
            write(options.out, [card], rows, failures)


if __name__ == "__main__":
    main()
