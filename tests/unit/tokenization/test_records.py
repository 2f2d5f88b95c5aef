"""tokenize.json holds what its record promises."""

from adder.core.files import read_json
from adder.core.progress import Progress
from adder.core.stage_spec import Context
from adder.tokenization.records import (
    BosToken,
    RejectedConversation,
    SplitCounts,
    Token,
    TokenizedExample,
    TokenizeRecord,
)
from adder.tokenization.run import TokenizeInputs, run
from adder.tokenization.stage import TokenizeSettings
from chat_families import conversation
from tiny import write_conversations


def test_the_file_has_the_keys_of_the_record(tmp_path, tiny_model_dir):
    rows = [{"id": f"a:{n}", "messages": conversation("a?", text)} for n, text in enumerate(["A.", "B.", " "])]
    (tmp_path / "format").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model").symlink_to(tiny_model_dir)
    for split in ("train", "heldout"):
        write_conversations(tmp_path / "format" / f"{split}.parquet", rows)
    run(
        TokenizeSettings(max_rejected=0.5),
        TokenizeInputs(tmp_path / "format", tmp_path / "model"),
        tmp_path,
        Context(Progress.silent()),
    )
    record: TokenizeRecord = read_json(tmp_path / "tokenize.json")
    assert record.keys() == TokenizeRecord.__required_keys__
    assert record["end_of_turn"].keys() == record["pad"].keys() == Token.__required_keys__
    assert record["bos"].keys() == BosToken.__required_keys__
    assert record["counts"].keys() == record["reply_tokens"].keys() == {"train", "heldout"}
    assert all(counts.keys() == SplitCounts.__required_keys__ for counts in record["counts"].values())
    assert all(example.keys() == TokenizedExample.__required_keys__ for example in record["examples"])
    assert record["rejected_count"] == 2
    assert all(row.keys() == RejectedConversation.__required_keys__ for row in record["rejected"])
