"""lengths.json holds what its record promises."""

from adder.packing.records import Histogram, LengthCandidate, LengthChoice, LengthsRecord, PackingLayout, Truncation
from lengths_stage import pack


def test_the_file_has_the_keys_of_the_record(tmp_path):
    record = pack(tmp_path, [30, 100, 20, 90], max_seq_length=64).record
    assert record.keys() == LengthsRecord.__required_keys__
    assert record["histogram"].keys() == Histogram.__required_keys__
    assert record["max_seq_length"].keys() == record["packing"].keys() == LengthChoice.__required_keys__
    assert record["truncation"].keys() == Truncation.__required_keys__
    for candidate in record["max_seq_length"]["alternatives"]:
        assert candidate.keys() - {"attention_share"} == LengthCandidate.__required_keys__
    for layout in record["packing"]["alternatives"]:
        assert layout.keys() == PackingLayout.__required_keys__
