"""Adder: from instruction data and a base model to a merged, evaluated model.

One module a stage; nothing here knows of Snakemake.
"""
