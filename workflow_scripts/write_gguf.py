"""Write the merged model as one GGUF file, and read it back."""

from job import run

run(snakemake, "gguf", module="adder.export.gguf")
