"""The accepted rows as arrays, and the class that each ends in."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from adder.formatting.block_converter import HELDOUT, TEST, TRAIN, UNDECIDED

# What becomes of an accepted row, beside TRAIN, HELDOUT and TEST.
DUPLICATE, NEAR_DUPLICATE, LEAKED, LEFT_OUT = range(UNDECIDED + 1, UNDECIDED + 5)
UNDESIRED = UNDECIDED + 5  # of no accepted row: such rows are left out where they are read
CLASSES = {
    "train": TRAIN,
    "heldout": HELDOUT,
    "tests": TEST,
    "duplicates": DUPLICATE,
    "near_duplicates": NEAR_DUPLICATE,
    "leaked": LEAKED,
    "left_out": LEFT_OUT,
    "undesired": UNDESIRED,
}


@dataclass
class AcceptedRows:
    """n rows in the order of the data; `split` becomes each row's class, one of CLASSES.

    source: index into `sources`. row: number within the source. digest, prompt: hashes of the conversation and of what
    it asks. value: hash of the column of group_by or stratify_by, 0 where it is missing; None without such a column.
    passage: what each is about (passages.passage_of_each). reply: replies.reply_key of each. with_system: where the
    system message is part of what is asked (heldout_split.asked), nowhere if None. signatures: (n,
    minhash.PERMUTATIONS), or (0, …) where near-duplicates aren't looked for.
    """

    sources: list[str]
    source: npt.NDArray[np.int32]
    row: npt.NDArray[np.int64]
    split: npt.NDArray[np.int8]
    digest: npt.NDArray[np.uint64]
    prompt: npt.NDArray[np.uint64]
    value: npt.NDArray[np.uint64] | None
    signatures: npt.NDArray[np.uint8]
    passage: npt.NDArray[np.uint64]
    reply: npt.NDArray[np.uint64]
    with_system: npt.NDArray[np.bool_] | None = None

    def id(self, index: int) -> str:
        """A row's id, "source:row"."""
        return f"{self.sources[self.source[index]]}:{self.row[index]}"

    def are(self, kind: int) -> npt.NDArray[np.bool_]:
        """Which rows are of a class."""
        return self.split == kind

    def count_by_source(self) -> list[dict[str, int]]:
        """{class: rows} of each of `sources`, in their order."""
        width = UNDESIRED + 1
        table = np.bincount(self.source * width + self.split, minlength=len(self.sources) * width).reshape(-1, width)
        return [{name: counted[kind] for name, kind in CLASSES.items()} for counted in table.tolist()]
