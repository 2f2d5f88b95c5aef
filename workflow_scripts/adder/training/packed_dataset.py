"""What training reads: packs, put together from the mapped token table at the moment they are needed."""

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Generic, TypedDict, TypeVar

import numpy as np
from datasets import Dataset
from numpy.typing import NDArray
from torch.utils.data import BatchSampler, RandomSampler, SequentialSampler
from torch.utils.data import Dataset as TorchDataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from adder.core.files import read_table
from adder.core.labels import IGNORE_INDEX
from adder.tokenization.token_table import TokenTable
from adder.training.batching import deal

# What a rank computes that has no pack left: it must take part in each pass, and learns nothing from this one.
EMPTY_PACK = {"input_ids": [0, 0], "labels": [IGNORE_INDEX, IGNORE_INDEX], "seq_lengths": [2]}

Item = TypeVar("Item")


class Pack(TypedDict):
    """Examples joined: their token ids, their labels, and the length of each; int64, as torch has them."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    seq_lengths: NDArray[np.int64]


class PackedExamples:
    """The packs of a lengths stage over the examples of a tokenize stage.

    `seq_lengths`: for each pack the tokens of its pieces (int32 arrays). With `reshuffle`, `start_epoch` fills the
    packs anew: each piece changes places with another of the same length, so that every pack keeps its shape, an epoch
    its number of steps, and examples meet others than before.
    """

    def __init__(self, tokens: Path, packs: Path, seed: int, reshuffle: bool):
        table = read_table(packs)
        self.tokens = TokenTable(tokens)
        self.seed, self.reshuffle = seed, reshuffle
        self._borders = np.asarray(table.column("seq_lengths").combine_chunks().offsets)
        self._pieces = {
            name: np.asarray(table.column(name).combine_chunks().values) for name in ("rows", "starts", "seq_lengths")
        }
        self._order = np.arange(len(self._pieces["rows"]))

    @property
    def seq_lengths(self) -> list[NDArray[np.int32]]:
        """Tokens of each piece, by pack."""
        return np.split(self._pieces["seq_lengths"], self._borders[1:-1])

    def start_epoch(self, epoch: int) -> None:
        """Fill the packs for an epoch (from 0), the same way whenever that epoch is started."""
        lengths = self._pieces["seq_lengths"]
        self._order = np.arange(len(lengths))
        if self.reshuffle and epoch:
            shuffled = np.random.default_rng([self.seed, epoch]).permutation(len(lengths))
            # Two lists of all pieces by length, one in order and one shuffled: equal places are of equal length.
            in_order = np.argsort(lengths, kind="stable")
            self._order[in_order] = shuffled[np.argsort(lengths[shuffled], kind="stable")]

    def pack(self, number: int) -> Pack:
        """One pack: its pieces' `input_ids` and `labels` joined, and their `seq_lengths`.

        The first label of every piece is IGNORE_INDEX, as the token that would predict it is of another example.
        """
        ids, labels = [], []
        chosen = self._order[self._borders[number] : self._borders[number + 1]]
        for row, start, length in zip(*(self._pieces[name][chosen] for name in self._pieces), strict=True):
            ids.append(self.tokens.input_ids(row)[start : start + length])
            piece = self.tokens.labels(row)[start : start + length].copy()
            piece[0] = IGNORE_INDEX
            labels.append(piece)
        return {
            "input_ids": np.concatenate(ids).astype(np.int64),
            "labels": np.concatenate(labels).astype(np.int64),
            "seq_lengths": self._pieces["seq_lengths"][chosen].astype(np.int64),
        }

    def longest_example(self) -> NDArray[np.int64]:
        """Token ids of the longest piece of all."""
        number = int(np.argmax(self._pieces["seq_lengths"]))
        row, start, length = (int(values[number]) for values in self._pieces.values())
        return self.tokens.input_ids(row)[start : start + length].astype(np.int64)

    def dataset(self) -> Dataset:
        """The packs as a data set that makes each of them when it is asked for."""
        numbers = Dataset.from_dict({"pack": np.arange(len(self._borders) - 1)})

        def make(batch: dict[str, list[int]]) -> dict[str, list[NDArray[np.int64]]]:
            packs = [self.pack(number) for number in batch["pack"]]
            return {name: [pack[name] for pack in packs] for name in ("input_ids", "labels", "seq_lengths")}

        return numbers.with_transform(make)


class WithEmptyPack(TorchDataset[Any]):
    """A data set with EMPTY_PACK behind its last row."""

    def __init__(self, rows: Dataset):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return EMPTY_PACK if number == len(self.rows) else self.rows[number]


class DealtBatches(BatchSampler):
    """The batches of all ranks in turn: first each one's first of an optimizer step, then each one's second, ...

    `sampler` has the order of the rows, `tokens` their lengths; `together` rows make a step, whatever the number of
    `processes`, each of which takes `passes` batches for it, and fewer for the last step where that is enough. An empty
    batch has the row behind the last. `micro_batch`: rows of a batch, at most.
    """

    batch_size, drop_last = None, False  # as accelerate, which gives each process its batches, knows uneven ones

    def __init__(
        self,
        sampler: RandomSampler | SequentialSampler,
        tokens: Sequence[int],
        together: int,
        processes: int,
        passes: int,
        micro_batch: int,
    ):
        self.sampler, self.tokens, self.together = sampler, tokens, together
        self.processes, self.passes, self.micro_batch = processes, passes, micro_batch

    def __iter__(self) -> Iterator[list[int]]:
        step: list[int] = []
        for number, row in enumerate(self.sampler, start=1):
            step.append(row)
            if len(step) == self.together or number == len(self.sampler):
                shares = deal(step, self.tokens, self.processes, self._passes(len(step)), self.micro_batch)
                for batches in zip(*shares, strict=True):
                    yield from (batch or [len(self.tokens)] for batch in batches)
                step = []

    def __len__(self) -> int:
        whole, rest = divmod(len(self.sampler), self.together)
        return self.processes * (whole * self.passes + self._passes(rest))

    def _passes(self, rows: int) -> int:
        return self.passes if rows == self.together else -(-rows // (self.processes * self.micro_batch))


class ReadAhead(Generic[Item]):
    """Goes through `source`, some of whose items may be read before they are asked for."""

    def __init__(self, source: Iterator[Item]):
        self.source: Iterator[Item] = source
        self.waiting: deque[Item] = deque()

    def __iter__(self) -> "ReadAhead[Item]":
        return self

    def __next__(self) -> Item:
        return self.waiting.popleft() if self.waiting else next(self.source)

    def read(self, number: int) -> None:
        """Have `number` items at hand, or those that are left."""
        self.waiting.extend(islice(self.source, number - len(self.waiting)))


class RefillPacks(TrainerCallback):
    """Tells the packs which epoch begins, also when training continues in the middle of one."""

    def __init__(self, packs: PackedExamples):
        self.packs = packs

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Called by the trainer before it reads the first batch of an epoch."""
        self.packs.start_epoch(int(state.epoch or 0))


def heldout_examples(tokens: Path, most: int) -> Dataset | None:
    """The first `most` held-out examples as packs of one, longest first so that batches are even; None without any."""
    table = TokenTable(tokens)
    rows = [table.row(number) for number in range(min(most, len(table)))]
    if not rows:
        return None
    return Dataset.from_list(
        [
            {
                "input_ids": row["input_ids"],
                "labels": [IGNORE_INDEX, *row["labels"][1:]],
                "seq_lengths": [len(row["input_ids"])],
            }
            for row in sorted(rows, key=lambda row: (-len(row["input_ids"]), row["id"]))
        ]
    )
