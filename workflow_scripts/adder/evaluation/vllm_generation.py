"""Replies by vLLM, through lm-eval's own vLLM model. Imported only where vLLM is installed and there is a GPU."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

# The engine runs in this process: one of its own would start by running Snakemake's script again.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")

from adder.evaluation.generation import ReplyCounts

if TYPE_CHECKING:
    VLLM: Any = object  # lm-eval's registry hides its type
else:
    from lm_eval.models.vllm_causallms import VLLM

MEMORY_SHARE = 0.85  # of the GPU's memory, once the model that measured the losses has left it


class VllmReplyModel(VLLM):
    """lm-eval's vLLM model with the prompts, the end and the counts of generation.HfReplyModel.

    vLLM batches by itself.
    """

    def __init__(self, model: Path, tokenizer: Path, dtype: str, stop_ids: list[int], context: int) -> None:
        super().__init__(
            pretrained=str(model),
            tokenizer=str(tokenizer),
            dtype=dtype,
            max_model_len=context,
            batch_size="auto",
            add_bos_token=False,  # prompts come rendered, with every control token that they need
            gpu_memory_utilization=MEMORY_SHARE,
            generation_config="vllm",  # not the model's own, with its penalties
        )
        self.stop_ids = stop_ids
        self.written: dict[tuple[int, ...], ReplyCounts] = {}

    def modify_gen_kwargs(self, *args: Any, **kwargs: Any) -> tuple[dict[str, Any], list[str], int]:
        """lm-eval's options, and the ids that end a reply; control tokens within it show, as elsewhere."""
        options, until, most = super().modify_gen_kwargs(*args, **kwargs)
        return {**options, "stop_token_ids": self.stop_ids, "skip_special_tokens": False}, until, most

    def _model_generate(self, requests: list[list[int]], generate: bool = False, sampling_params: Any = None) -> Any:
        outputs: Any = super()._model_generate(requests, generate=generate, sampling_params=sampling_params)
        for ids, output in zip(requests, outputs, strict=True):
            reply = output.outputs[0]
            truncated = reply.finish_reason == "length"
            self.written[tuple(ids)] = {"new_tokens": len(reply.token_ids), "truncated": truncated}
        return outputs
