# What Snakemake puts into the namespace of a script, for the type checker; its attributes are the rule's own names.
from typing import Any

snakemake: Any
