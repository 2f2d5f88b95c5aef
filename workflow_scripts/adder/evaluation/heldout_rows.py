"""The held-out rows as an evaluation takes them: what the model is asked, and the reply that it should give."""

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerFast

from adder.core.errors import UserError
from adder.core.labels import IGNORE_INDEX
from adder.evaluation.reply_text import ReplyReader
from adder.formatting.conversation import Conversation, Message
from adder.tokenization.chat_template import ChatTemplate
from adder.tokenization.message_texts import reasoning_and_answer
from adder.tokenization.token_table import TokenTable


@dataclass
class HeldoutRow:
    """One row. The prompt is all that stands before the last reply.

    input_ids and labels: as training would see the row. prompt_text and prompt_ids: what the template makes of the
    prompt. reference: the answer that a reply is compared with; reference_text: all of the last reply, its reasoning
    too, as ReplyReader.text has it. A plain text has no prompt, and is its own reference. group: by
    data.heldout.group_by, if there are such.
    """

    id: str
    input_ids: list[int]
    labels: list[int]
    reference: str
    reference_text: str = ""
    prompt: list[Message] = field(default_factory=list)
    prompt_text: str = ""
    prompt_ids: list[int] = field(default_factory=list)
    group: str | None = None

    def is_as_trained(self) -> bool:
        """Whether the prompt is, token for token, what stood before the last reply in training."""
        return self.input_ids[: len(self.prompt_ids)] == self.prompt_ids

    def is_cut(self, limit: int, context: int) -> bool:
        """Whether the prompt loses its beginning, so that a reply of `limit` tokens fits the context."""
        return len(self.prompt_ids) + limit > context


def load_rows(
    tokens: Path,
    conversations: Path,
    most: int | None,
    tokenizer: PreTrainedTokenizerFast,
    reader: ReplyReader | None = None,
) -> list[HeldoutRow]:
    """Read the rows of heldout.arrow (`tokens`) and heldout.parquet (`conversations`), at most `most` of them.

    A sample is the rows with the smallest digests of their ids: rows that are added later displace few. Raises
    UserError when no row was held out.
    """
    table = TokenTable(tokens)
    numbers = list(range(len(table)))
    if not numbers:
        raise UserError("data.heldout: no row is held out, so there is nothing to evaluate on; set its share or size")
    if most is not None and most < len(table):
        digests = [hashlib.blake2b(name.encode(), digest_size=16).digest() for name in table.ids(numbers)]
        numbers = sorted(sorted(numbers, key=lambda number: digests[number])[:most])
    rows = [table.row(number) for number in numbers]
    found = _conversations(conversations, {row["id"] for row in rows})
    template = ChatTemplate(tokenizer) if tokenizer.chat_template else None
    reader = reader or ReplyReader(tokenizer)
    made = []
    for row in rows:
        conversation, group = found[row["id"]]
        held = HeldoutRow(row["id"], row["input_ids"], row["labels"], conversation.get("text", ""), group=group)
        if "messages" in conversation:
            assert template is not None  # else there were no conversations among the rows
            _add_question(held, conversation["messages"], conversation, reader, template)
        made.append(held)
    return made


def _conversations(path: Path, wanted: set[str]) -> dict[str, tuple[Conversation, str | None]]:
    """Some conversations by id, each with its group."""
    found: dict[str, tuple[Conversation, str | None]] = {}
    with pq.ParquetFile(path) as file:
        columns = [name for name in ("id", "conversation", "group") if name in file.schema_arrow.names]
        for batch in file.iter_batches(columns=columns):
            for row in batch.to_pylist():
                if row["id"] in wanted:
                    found[row["id"]] = (json.loads(row["conversation"]), row.get("group"))
    return found


def _add_question(
    row: HeldoutRow,
    turns: list[Message],
    conversation: Conversation,
    reader: ReplyReader,
    template: ChatTemplate,
) -> None:
    """What the model is asked, and the reply that it should give."""
    last = max(index for index, turn in enumerate(turns) if turn["role"] == "assistant")
    row.prompt = turns[:last]
    row.prompt_text = template.render(row.prompt, prompt=True, tools=conversation.get("tools"))
    row.prompt_ids = reader.tokenizer(row.prompt_text, add_special_tokens=False)["input_ids"]
    start = len(row.prompt_ids)
    own = [
        index for index, label in zip(row.input_ids[start:], row.labels[start:], strict=True) if label != IGNORE_INDEX
    ]
    if own and row.is_as_trained():  # as the model has to write it, but for the token that ends it
        row.reference_text = reader.text(own[:-1])
        row.reference = reader.answer(row.reference_text)
    else:
        row.reference_text = row.reference = reasoning_and_answer(turns[last])[1]
