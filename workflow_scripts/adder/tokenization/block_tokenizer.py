"""Blocks of conversations to tokens, by workers, or as an earlier run has them."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import orjson
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from adder.core import row_blocks
from adder.core.errors import UserError
from adder.core.file_digests import canonical
from adder.core.files import digest_file
from adder.core.labels import IGNORE_INDEX
from adder.core.row_blocks import Digests
from adder.core.stage_spec import Earlier
from adder.formatting.conversation import Conversation
from adder.tokenization.labels import Batch, Labeller

CODE = "adder.tokenization.block_tokenizer"
WEIGHTS = (".safetensors", ".gguf", ".bin", ".pt", ".pth")
Counts = npt.NDArray[np.int32]
Integers = npt.NDArray[np.int64]

READ = pa.ipc.IpcReadOptions(use_threads=False)  # processes are forked after it
READ_KEYS = pa.ipc.IpcReadOptions(use_threads=False, included_fields=[0])
Reader = pa.ipc.RecordBatchFileReader
INTEGERS = pa.list_(pa.int32())
REJECTED = pa.list_(pa.struct([("row", pa.int32()), ("reason", pa.string()), ("kind", pa.string())]))
# Of `<split>.blocks.arrow`, a row for each block: its key; which record batch of `<split>.arrow` holds its examples, -1
# where it has none; and of a TokenizedBlock what that batch doesn't hold.
BLOCKS = pa.schema(
    [
        ("key", pa.string()),
        ("batch", pa.int32()),
        *((name, INTEGERS) for name in ("rows", "ends", "counts", "replies")),
        ("rejected", REJECTED),
        *((name, pa.int32()) for name in ("cut", "split", "unmatched")),
        ("unwritten", pa.list_(pa.string())),
        ("folds_reasoning", pa.bool_()),
    ]
)


class Piece(NamedTuple):
    """Rows of a Parquet file that follow one another; `key` is equal for equal conversations."""

    start: int
    stop: int
    key: str


class RejectedRow(NamedTuple):
    """A conversation that can't be used: its place in the block, the reason, and the kind of reason."""

    row: int
    reason: str
    kind: str


@dataclass(frozen=True)
class TokenizedBlock:
    """What is made of a block's conversations: n examples, of those at `batch.rows`; of one maybe several."""

    batch: Batch
    labelled: Counts  # (n,), tokens that carry loss
    rejected: list[RejectedRow]
    cut: int  # examples encoded in pieces
    split: int  # conversations that became several examples
    unmatched: int  # see Labeller
    unwritten: list[str]  # see PromptContents.unwritten_of_tools
    folds_reasoning: bool  # see ChatTemplate


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Load the fast tokenizer of a model directory, ready to encode whole texts. Raises UserError if it has none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # tokenizers raises no class of its own
        told = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
        raise UserError(f"can't load the model's tokenizer from {folder}: {told}") from error
    if not tokenizer.is_fast:
        raise UserError(f"{folder}: needs a fast tokenizer (tokenizer.json), found {type(tokenizer).__name__}")
    # A tokenizer.json may carry the truncation and padding of whoever saved it; nothing may be cut silently.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


class Table:
    """Rows of a Parquet file by number; of the row groups read last two are kept."""

    def __init__(self, path: Path, columns: list[str]) -> None:
        self._file = pq.ParquetFile(path)
        metadata = self._file.metadata
        sizes = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
        self._starts = np.cumsum([0, *sizes])
        self._columns = columns
        self._groups: dict[int, pa.Table] = {}

    def __len__(self) -> int:
        return int(self._starts[-1])

    def groups(self) -> Iterator[pa.Table]:
        """All row groups in order, one at a time."""
        return map(self.group, range(len(self._starts) - 1))

    def group(self, number: int) -> pa.Table:
        """One row group."""
        if number not in self._groups:
            kept = list(self._groups.items())[-1:]
            table = self._file.read_row_group(number, columns=self._columns, use_threads=False)
            self._groups = {**dict(kept), number: table}
        return self._groups[number]

    def rows(self, start: int, stop: int) -> pa.Table:
        """Some rows."""
        first, last = np.searchsorted(self._starts, [start, stop - 1], side="right") - 1
        parts = [self.group(number) for number in range(first, last + 1)]
        return pa.concat_tables(parts).slice(start - int(self._starts[first]), stop - start).combine_chunks()


class Scanner:
    """Digests and sizes (bytes) of the conversations of a row group of a Parquet file."""

    def __init__(self, path: Path) -> None:
        self._table = Table(path, ["conversation"])

    def __call__(self, group: int) -> tuple[Digests, Integers]:
        """Those of the row group of this number: uint8 (rows, row_blocks.DIGEST) and int64 (rows,)."""
        found: list[bytes] = []
        sizes: list[int] = []
        for chunk in self._table.group(group).column("conversation").chunks:
            texts = chunk.cast(pa.large_string())
            _, offsets, data = texts.buffers()
            borders = np.frombuffer(offsets, np.int64)[texts.offset : texts.offset + len(texts) + 1].tolist()
            view = memoryview(data or b"")
            found += [row_blocks.row_digest(view[a:b]) for a, b in pairwise(borders)]
            sizes += [b - a for a, b in pairwise(borders)]
        return row_blocks.as_digests(found), np.array(sizes, np.int64)


def pieces(scanned: list[tuple[Digests, Integers]]) -> list[Piece]:
    """The blocks of a Parquet file, given what was scanned of its row groups."""
    if not scanned:
        return []
    digests, sizes = (np.concatenate(parts) for parts in zip(*scanned, strict=True))
    borders = row_blocks.cut(digests, sizes)
    return [Piece(a, b, row_blocks.block_key(digests[a:b])) for a, b in pairwise(borders)]


class Worker:
    """Tokenises pieces of a Parquet file, which it reads by itself: only a few numbers and the tokens travel."""

    def __init__(self, labeller: Labeller, source: Path, split: bool) -> None:
        self.labeller, self.split = labeller, split
        self._table = Table(source, ["conversation"])

    def __call__(self, piece: Piece) -> TokenizedBlock:
        """Token ids and labels of a piece."""
        template = self.labeller.finder.template
        contents = self.labeller.finder.contents
        template.forget_reasoning()  # what is found depends on the piece alone
        contents.forget()
        before = self.labeller.cut, self.labeller.split, self.labeller.unmatched
        texts = self._table.rows(piece.start, piece.stop).column("conversation").to_pylist()
        batch, reasons = self.labeller.label_batch([_parse(text) for text in texts], self.split)
        rejected = [RejectedRow(row, str(reason), reason.kind) for row, reason in sorted(reasons.items())]
        after = self.labeller.cut, self.labeller.split, self.labeller.unmatched
        cut, split, unmatched = (now - then for now, then in zip(after, before, strict=True))
        unwritten = sorted(contents.unwritten_of_tools)
        labelled = _count_labelled(batch)
        return TokenizedBlock(batch, labelled, rejected, cut, split, unmatched, unwritten, template.folds_reasoning)


def _parse(text: str) -> Conversation:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        return json.loads(text)  # whole numbers of more than 64 bits


def _count_labelled(batch: Batch) -> Counts:
    if not len(batch.rows):
        return np.zeros(0, np.int32)
    starts = np.cumsum(batch.lengths) - batch.lengths
    carries = batch.labels != IGNORE_INDEX
    carries[starts] = False  # nothing predicts an example's first token
    return np.add.reduceat(carries, starts, dtype=np.int32)


class EarlierTokens:
    """The blocks in the folders of earlier results, by key, as far as these were made by what `meaning` stands for."""

    def __init__(self, earlier: Earlier, meaning: str) -> None:
        self._found: dict[str, tuple[Reader, int, Reader]] = {}
        for folder in earlier.folders:
            for split in ("train", "heldout"):
                self._look_into(folder, split, meaning)

    def _look_into(self, folder: Path, split: str, meaning: str) -> None:
        try:  # mapped files stay readable when the folder is pruned meanwhile
            blocks, examples = (
                pa.memory_map(str(folder / name)) for name in (f"{split}.blocks.arrow", f"{split}.arrow")
            )
        except OSError:
            return
        keys = pa.ipc.open_file(blocks, options=READ_KEYS)
        if (keys.schema.metadata or {}).get(b"meaning") != meaning.encode():
            return
        readers = [pa.ipc.open_file(file, options=READ) for file in (blocks, examples)]
        for number, key in enumerate(keys.read_all().column("key").to_pylist()):
            self._found.setdefault(key, (readers[0], number, readers[1]))

    def __contains__(self, key: str) -> bool:
        return key in self._found

    def __getitem__(self, key: str) -> TokenizedBlock:
        """What was made of an equal block. Raises KeyError where there is none."""
        blocks, number, examples = self._found[key]
        block = blocks.get_batch(number)
        row = {name: block.column(name)[0] for name in BLOCKS.names}
        rejected = [RejectedRow(one["row"], one["reason"], one["kind"]) for one in row["rejected"].as_py()]
        rows, ends, counts, replies = (
            np.asarray(row[name].values, dtype=np.int64) for name in ("rows", "ends", "counts", "replies")
        )
        lists = [np.zeros(0, np.int32)] * 4
        if row["batch"].as_py() >= 0:
            batch = examples.get_batch(row["batch"].as_py())
            lists = [np.asarray(batch.column(name).values) for name in ("input_ids", "labels")]
            lists += [np.asarray(batch.column(name)) for name in ("tokens", "labelled")]
        ids, labels, lengths, labelled = lists
        made = Batch(rows, ids, labels, lengths.astype(np.int64), ends, counts, replies)
        others = (row[name].as_py() for name in ("cut", "split", "unmatched", "unwritten", "folds_reasoning"))
        return TokenizedBlock(made, labelled, rejected, *others)


def meaning(earlier: Earlier, model: Path, tokenizer: PreTrainedTokenizerFast, loss_on: str) -> str:
    """Digest of all that decides, beside the conversations, what their tokens and labels are."""
    files = {
        path.name: digest_file(path)
        for path in sorted(model.iterdir())
        if path.is_file() and not path.name.endswith(WEIGHTS)
    }
    libraries = row_blocks.versions("tokenizers", "transformers", "jinja2", "numpy", "pyarrow", "orjson")
    return row_blocks.meaning(earlier.code(CODE), libraries, files, canonical(tokenizer.chat_template), loss_on)


class BlockFile:
    """Writes the file of BLOCKS, a block at a time."""

    def __init__(self, path: Path, meaning: str) -> None:
        self._schema = BLOCKS.with_metadata({"meaning": meaning})
        options = pa.ipc.IpcWriteOptions(compression="lz4", use_threads=False)
        self._writer = pa.ipc.new_file(str(path), self._schema, options=options)
        self._batches = 0

    def add(self, key: str, block: TokenizedBlock) -> None:
        """Take the next block."""
        made = block.batch
        has_examples = len(made.rows) > 0
        row = {
            "key": [key],
            "batch": [self._batches if has_examples else -1],
            "rows": [made.rows],
            "ends": [made.ends],
            "counts": [made.counts],
            "replies": [made.replies],
            "rejected": [[one._asdict() for one in block.rejected]],
            "cut": [block.cut],
            "split": [block.split],
            "unmatched": [block.unmatched],
            "unwritten": [block.unwritten],
            "folds_reasoning": [block.folds_reasoning],
        }
        arrays = [pa.array(values, type=BLOCKS.field(name).type) for name, values in row.items()]
        self._writer.write_batch(pa.RecordBatch.from_arrays(arrays, schema=self._schema))
        self._batches += has_examples

    def close(self) -> None:
        """End the file."""
        self._writer.close()
