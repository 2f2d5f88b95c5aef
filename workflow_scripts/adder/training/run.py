"""Train on the packs: adapter (or full model), curves, and the plan that data and hardware led to."""

import gc
import shutil
from pathlib import Path

import torch

from adder.core.files import read_json
from adder.core.stage_spec import Context
from adder.training import fit, step_planner
from adder.training.distributed import launcher
from adder.training.monitoring import trackers
from adder.training.records import TrainInputs, TrainRecord, TrainSummary
from adder.training.stage import TrainSettings


def run(settings: TrainSettings, inputs: TrainInputs, out: Path, context: Context) -> TrainSummary:
    """Train; write `adapter/` (`model/` for method full), metrics.jsonl, samples.jsonl, plan.json, train.json to `out`.

    Training continues from the last whole checkpoint in `context.checkpoints`, by the plan that it began with. Where
    memory runs out, it goes on from there with a smaller plan. Each of several GPUs has a process of its own. Raises
    UserError for a set-up that can't work, when the loss stops being a number and when memory runs out with the
    smallest plan.
    """
    step_packs = step_planner.step_packs(settings, fit.load_packs(inputs, settings).seq_lengths)
    job = fit.TrainJob(
        settings=settings,
        inputs=inputs,
        out=out,
        checkpoints=context.checkpoints or out / "checkpoints",
        results=context.results,
        runtime=context.runtime,
        device=context.device,
        threads=context.threads,
        step_packs=step_packs,
        processes=launcher.choose_process_count(context.runtime.gpus, context.device, step_packs.packs),
    )
    while True:
        try:
            if job.processes.value == 1:
                fit.fit(job, context.progress)
            else:
                launcher.fit_in_processes(job, context.progress)
            break
        except step_planner.MemoryRanOut as error:
            context.progress.note(str(error))
        trackers.close_all()
        gc.collect()  # what is left of the training that failed, before the model is loaded anew
        torch.cuda.empty_cache()
    if context.checkpoints is None:
        shutil.rmtree(job.checkpoints, ignore_errors=True)
    return _summary(read_json(out / "train.json"))


def _summary(record: TrainRecord) -> TrainSummary:
    summary = TrainSummary(
        steps=record["steps"],
        final_loss=record["final_loss"],
        eval_loss=record["eval_loss"],
        tokens_per_second=record["tokens_per_second"],
    )
    if "peak_gpu_memory_bytes" in record:
        summary["peak_gpu_memory_bytes"] = record["peak_gpu_memory_bytes"]
    return summary
