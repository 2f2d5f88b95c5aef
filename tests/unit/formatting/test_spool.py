"""Conversations on disk while it is decided what becomes of them."""

import numpy as np

from adder.formatting.spool import FIGURES, Spool, pack


def part(*texts: str) -> bytes:
    figures = np.arange(len(texts) * len(FIGURES), dtype=np.int32).reshape(-1, len(FIGURES))
    return pack([text.encode() for text in texts], figures, [text[:1] for text in texts], [""] * len(texts))


def test_rows_come_back_in_any_order_from_any_part(tmp_path):
    spool = Spool(tmp_path / "spool")
    for texts in (("a", "bé", "c"), (), ("d",), ("e", "f")):
        spool.append(part(*texts), len(texts))
    spool.finish()
    assert spool.conversations(np.array([5, 1, 3, 1, 0])) == ["f", "bé", "d", "bé", "a"]
    assert spool.conversations(np.array([], np.int64)) == []
    assert spool.starts.tolist() == [0, 3, 3, 4, 6] and spool.slice(3) == slice(4, 6)


def test_a_part_holds_the_figures_of_its_rows(tmp_path):
    spool = Spool(tmp_path / "spool")
    spool.append(part("x", "y"), 2)
    spool.finish()
    read = spool.read(0)
    assert [read.column(name).to_pylist() for name in FIGURES] == [[n, n + len(FIGURES)] for n in range(len(FIGURES))]
    assert read.column("prompt_word").to_pylist() == ["x", "y"]


def test_nothing_is_left_where_the_spool_was(tmp_path):
    Spool(tmp_path / "spool")
    assert list(tmp_path.iterdir()) == []
