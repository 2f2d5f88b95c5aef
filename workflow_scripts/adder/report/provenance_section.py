"""The report's view of where a run came from and what it cost: files, versions, machines, time, price, energy."""

from adder.report import facts as report_data
from adder.report import plots
from adder.report.formatting import duration, number, size

# The stages whose files are listed with their digests, as (heading, stage, path or folder with a slash).
FILES = (
    ("Base model", "model", "model/"),
    ("Raw rows", "data", "rows.jsonl"),
    ("Conversations", "format", "train.parquet"),
    ("Conversations", "format", "heldout.parquet"),
    ("Tokens", "tokenize", "train.arrow"),
    ("Tokens", "tokenize", "heldout.arrow"),
    ("Tokenizer", "tokenize", "tokenizer/"),
    ("Packs", "lengths", "packs.parquet"),
    ("Adapter", "train", "adapter/"),
    ("Trained weights", "train", "model/"),
    ("Merged model", "merge", "model/"),
)


def provenance(settings: dict, facts: dict, metrics: dict) -> dict:
    """Stages, machines, versions, digests and cost."""
    records = facts["records"]
    stages = [
        {
            "name": stage,
            "task": task_of(stage, settings["tasks"]),
            "key": settings["stages"].get(stage, record.get("key", "")),
            "path": facts["paths"][stage],
            "seconds": record.get("seconds"),
            "memory": record.get("peak_memory_bytes"),
            "gpu_memory": record.get("peak_gpu_memory_bytes"),
            "restored": bool(record.get("restored")),
            "finished_at": record.get("finished_at", ""),
        }
        for stage, record in records.items()
    ]
    timed = [
        {"name": s["name"], "value": s["seconds"], "kind": "tuned" if s["name"] == "train" else "plain", "note": ""}
        for s in stages
        if s["seconds"] is not None
    ]
    machines = dict.fromkeys(machine(record.get("hardware") or {}) for record in records.values())
    return {
        "model": facts["model"],
        "stages": stages,
        "cost": cost_figures(metrics["cost"]),
        "plot": plots.bars(timed, duration, "Seconds a stage took"),
        "machines": [text for text in machines if text],
        "versions": report_data.versions(facts) | {"lm-eval": facts["evaluate_tuned"].get("lm_eval_version", "–")},
        "files": files(records, facts["paths"]),
        "sources": [
            (source["name"], source["sha256"]) for source in facts["data"] if source.get("sha256")
        ],
        "any_restored": any(s["restored"] for s in stages),
        "any_gpu": any(s["gpu_memory"] for s in stages),
    }  # fmt: skip


def cost_figures(cost: dict) -> list[tuple[str, str, str]]:
    """Time, price and energy as (name, value, note); the latter two where they are known."""
    rows = [("Time", duration(cost["total_seconds"]), f"{len(cost['seconds'])} stages, one after another")]
    if price := cost["price"]:
        hourly = money(price["per_hour"], price["currency"])
        rows.append(("Price", money(price["value"], price["currency"]), f"at {hourly} an hour"))
    if energy := cost["energy"]:
        known = "all stages" if energy["stages"].keys() == cost["seconds"].keys() else ", ".join(energy["stages"])
        rows.append(("Energy", f"{number(energy['joules'] / 3.6e6)} kWh", f"recorded by {known}"))
    return rows


def money(value: float, currency: str) -> str:
    """An amount with its currency; small ones with two digits that count."""
    return f"{value:,.2f} {currency}" if value >= 0.1 or value == 0 else f"{number(value)} {currency}"


def task_of(stage: str, tasks: list[dict]) -> str:
    """The task of a stage such as task_base_0; "" for other stages."""
    return tasks[int(stage.rpartition("_")[2])]["task"] if stage.startswith("task_") else ""


def files(records: dict[str, dict], paths: dict[str, str]) -> list[dict]:
    """The files that decide or are the result: {group, path, bytes, digest}."""
    return [
        {"group": heading, "path": f"{paths[stage]}/{path}", "bytes": known["bytes"], "digest": known["digest"]}
        for heading, stage, wanted in FILES
        for path, known in sorted(records[stage]["outputs"].items())
        if path == wanted or (wanted.endswith("/") and path.startswith(wanted))
    ]


def machine(hardware: dict) -> str:
    """One line on the machine that a stage ran on."""
    parts = [hardware.get("cpu"), hardware.get("cores") and f"{hardware['cores']} cores"]
    parts.append(hardware.get("memory_bytes") and f"{size(hardware['memory_bytes'])} memory")
    gpu = hardware.get("gpu")
    parts.append(str(gpu.get("name", gpu)) if isinstance(gpu, dict) else gpu)
    return ", ".join(str(part) for part in parts if part)
