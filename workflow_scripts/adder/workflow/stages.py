"""All stages, in an order in which each comes after those that it reads."""

from adder.core.stage_spec import StageSpec
from adder.data.stage import DATA, MODEL
from adder.evaluation.stage import EVALUATE, JUDGE
from adder.evaluation.tasks.stage import TASK
from adder.export.stage import GGUF
from adder.formatting.stage import FORMAT
from adder.merging.stage import MERGE
from adder.packing.stage import LENGTHS
from adder.report.stage import REPORT
from adder.tokenization.stage import TOKENIZE
from adder.training.stage import ISOLATION, TRAIN

SPECS: dict[str, StageSpec] = {
    spec.name: spec
    for spec in (MODEL, DATA, FORMAT, TOKENIZE, LENGTHS, ISOLATION, TRAIN, MERGE, EVALUATE, TASK, JUDGE, REPORT, GGUF)
}
