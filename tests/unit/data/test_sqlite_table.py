"""SQLite tables: the named one or the only one, all of its rows in order, and none that still waits to be written."""

import gzip
import sqlite3
from contextlib import closing

import pytest

from adder.core.errors import UserError
from data_stages import data, read, write_rows


def _make(path, *statements):
    with closing(sqlite3.connect(path)) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()
    return path


ONE = (
    "CREATE TABLE pairs (question TEXT, answer TEXT, score REAL, n INTEGER, raw BLOB)",
    "CREATE INDEX by_answer ON pairs (answer, question, score, n, raw)",
    "INSERT INTO pairs VALUES ('What?', 'z', 0.5, 9007199254740993, NULL), ('Grüße', 'a', NULL, 2, x'00ff')",
)
ROWS = [
    {"question": "What?", "answer": "z", "score": 0.5, "n": 9007199254740993, "raw": None},
    {"question": "Grüße", "answer": "a", "score": None, "n": 2, "raw": None},
]


@pytest.mark.parametrize("ending", ["sqlite", "sqlite3", "db"])
def test_the_only_table_is_read_in_order_with_what_json_cant_hold_named(tmp_path, ending):
    path = _make(tmp_path / f"a ?#.{ending}", *ONE)
    summary, records, entries, *_ = write_rows(tmp_path / "data", [{"path": str(path)}])
    assert data(records) == ROWS and records[1]["unfit"] == {"raw": "binary"}
    assert (entries[0]["kind"], entries[0]["encoding"], summary["unreadable"]) == ("sqlite", None, 0)
    (tmp_path / f"b.{ending}.gz").write_bytes(gzip.compress(path.read_bytes()))
    assert [row["n"] for _, row in read(tmp_path / f"b.{ending}.gz")] == [row["n"] for row in ROWS]


def test_one_of_several_tables_must_be_named_and_a_view_may_be(tmp_path):
    path = _make(
        tmp_path / "a.db",
        *ONE,
        'CREATE TABLE "odd ""name" (a TEXT PRIMARY KEY) WITHOUT ROWID',
        """INSERT INTO "odd ""name" VALUES ('y'), ('x')""",
        "CREATE VIEW best AS SELECT question, answer FROM pairs WHERE score > 0",
    )
    with pytest.raises(UserError, match=r'a\.db: has 2 tables; name one by `table:` \(pairs, odd "name, best\)'):
        read(path)
    assert [row["a"] for _, row in read(path, table='odd "name')] == ["x", "y"]
    assert [row for _, row in read(path, table="best")] == [{"question": "What?", "answer": "z"}]
    with pytest.raises(UserError, match=r"a\.db: has no table 'none'; its tables: pairs, "):
        read(path, table="none")


def test_text_that_is_no_utf8_costs_its_row_alone(tmp_path):
    path = _make(tmp_path / "a.db", "CREATE TABLE t (a)", "INSERT INTO t VALUES ('x'), (CAST(x'61e9' AS TEXT)), ('y')")
    _, records, *_ = write_rows(tmp_path / "data", [{"path": str(path)}])
    assert data(records) == [{"a": "x"}, {"a": "y"}] and "invalid unicode" in records[1]["error"]


def test_changes_that_wait_beside_the_file_are_not_missed(tmp_path):
    with closing(sqlite3.connect(tmp_path / "a.db")) as connection:
        connection.execute("PRAGMA journal_mode=WAL")
        connection.execute("CREATE TABLE t (a)")
        connection.execute("INSERT INTO t VALUES (1)")
        connection.commit()
        with pytest.raises(UserError, match=r"a\.db: changes to it are still in a file beside it \(a\.db-wal"):
            read(tmp_path / "a.db")
    assert read(tmp_path / "a.db") == [(1, {"a": 1})]


def test_what_is_no_database_or_has_no_tables_is_named(tmp_path):
    (tmp_path / "a.db").write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(UserError, match=r"a\.db: can't be read as SQLite: file is not a database"):
        read(tmp_path / "a.db")
    with pytest.raises(UserError, match=r"b\.db: has no tables"):
        read(_make(tmp_path / "b.db", "CREATE TABLE t (a)", "DROP TABLE t"))
    (tmp_path / "rows.jsonl").write_text("{}\n")
    with pytest.raises(UserError, match="`table` is for SQLite files and spreadsheets, and this one is read as jsonl"):
        read(tmp_path / "rows.jsonl", table="t")
