"""The rows of one table of an SQLite file, in the order in which they were put there."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from adder.core.errors import UserError
from adder.data.compression import uncompressed

JOURNAL = bytes.fromhex("d9d505f920a163d7")  # how a journal begins that is to be played back


def rows(path: Path, table: str | None) -> Iterator[dict[str, Any]]:
    """The rows of the table or view `table`, or of the only table there is.

    The file is only read, and locked for nobody. Text that isn't UTF-8 comes with half surrogate pairs, so that its row
    is unreadable. Raises UserError where the table isn't told or isn't there, or where the file can't be read.
    """
    _refuse_pending(path)
    with uncompressed(path) as plain:
        try:
            address = f"{plain.resolve().as_uri()}?mode=ro&immutable=1"
            with closing(sqlite3.connect(address, uri=True)) as connection:
                connection.text_factory = lambda data: data.decode("utf-8", "surrogateescape")
                yield from _rows(connection, *_chosen(connection, path, table))
        except sqlite3.Error as error:
            raise UserError(f"{path}: can't be read as SQLite: {error}") from error


def _rows(connection: sqlite3.Connection, table: str, is_view: bool) -> Iterator[dict[str, Any]]:
    everything = f"""SELECT * FROM "{table.replace('"', '""')}\""""
    try:
        cursor = connection.execute(everything if is_view else f"{everything} ORDER BY rowid")
    except sqlite3.OperationalError:  # WITHOUT ROWID: in the order of the primary key
        cursor = connection.execute(everything)
    names = [column[0] for column in cursor.description]
    for cells in cursor:
        yield dict(zip(names, cells, strict=True))


def _chosen(connection: sqlite3.Connection, path: Path, table: str | None) -> tuple[str, bool]:
    """The table's name, and whether it is a view."""
    query = "SELECT name, type = 'view' FROM sqlite_master WHERE type IN ('table', 'view') ORDER BY rowid"
    there = {name: bool(is_view) for name, is_view in connection.execute(query) if not name.startswith("sqlite_")}
    shown = ", ".join(list(there)[:20]) or "none"
    if table is not None:
        if table not in there:
            raise UserError(f"{path}: has no table '{table}'; its tables: {shown}")
        return table, there[table]
    tables = [name for name, is_view in there.items() if not is_view]
    if len(tables) != 1:
        raise UserError(f"{path}: has {len(tables) or 'no'} tables; name one by `table:` ({shown})")
    return tables[0], False


def _refuse_pending(path: Path) -> None:
    """Raise UserError where changes wait in a file beside it, which a reader of the one file would miss."""
    log, journal = path.with_name(f"{path.name}-wal"), path.with_name(f"{path.name}-journal")
    pending = log.is_file() and log.stat().st_size > 0
    if not pending and journal.is_file():
        with journal.open("rb") as file:
            pending = file.read(len(JOURNAL)) == JOURNAL
    if pending:
        raise UserError(
            f"{path}: changes to it are still in a file beside it ({path.name}-wal or -journal): close the program "
            f"that writes it, or run `sqlite3 {path} 'PRAGMA wal_checkpoint(TRUNCATE)'`"
        )
