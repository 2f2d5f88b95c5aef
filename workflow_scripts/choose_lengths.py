"""Analyse the lengths, choose max_seq_length and packing, write the packs."""

from job import run

run(snakemake, "lengths", module="adder.packing.run")
