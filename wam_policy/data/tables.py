"""Reads parquet tables column by column, each checked and cast to the type that is needed."""

# N rows, D numbers of a vector

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from wam_policy.errors import DatasetError, MissingExtraError

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise MissingExtraError("pyarrow", "train") from error

CURE = "download or record the dataset again"

# Largest number of rows of all tables of a dataset; a hundred days of recording at 30 Hz are 260
# millions.
MAX_ROWS = 2**28


class RowError(ValueError):
    """A value that cannot be read, at a row of a table.

    Attributes:
        row: Index of the row.
    """

    def __init__(self, row: int, problem: str) -> None:
        """Create the error.

        Args:
            row: Index of the row.
            problem: What is wrong with its value.
        """
        self.row = row
        super().__init__(problem)


def count_rows(file: Path) -> int:
    """Return the number of rows of a parquet file, from its footer.

    Raises:
        DatasetError: The file is missing, damaged, or has an impossible number of rows.
    """
    rows: int = _footer(file).num_rows
    if not 0 <= rows <= MAX_ROWS:
        raise DatasetError(f"{file} states {rows:,} rows; {CURE}")
    return rows


def read_table(file: Path, columns: Sequence[str] | None = None) -> Any:
    """Read a parquet file, or some of its columns.

    Args:
        file: Path of the file.
        columns: Names of the columns, all of which it must have; None for all that it has.

    Returns:
        A `pyarrow.Table` with the columns in this order.

    Raises:
        DatasetError: The file is missing or damaged, or lacks a column.
    """
    count_rows(file)
    selected = None if columns is None else list(columns)
    try:
        available = pq.read_schema(file).names
        missing = [name for name in columns or () if name not in available]
        if missing:
            raise DatasetError(f"{file} has no column {', '.join(missing)}; {CURE}")
        # Checksums are verified where the file has them.
        table = pq.read_table(
            file, columns=selected, partitioning=None, page_checksum_verification=True
        )
        table.validate(full=True)
    except DatasetError:
        raise
    except (OSError, ValueError, TypeError, LookupError, pa.ArrowException) as error:
        raise _unreadable(file, error) from error
    return table


def integer_column(file: Path, table: Any, name: str) -> np.ndarray:
    """Return a column of integers, int64 [N].

    pandas writes integers as floats where a row has none: these are taken if they have no fraction.

    Raises:
        DatasetError: A row is empty, or is no integer.
    """
    column = _present(file, table, name)
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise DatasetError(f"{file}, row {row}: `{name}` is empty; {CURE}")
    try:
        if pa.types.is_floating(column.type):
            column = column.cast(pa.float64())
        integers: np.ndarray = column.cast(pa.int64()).to_numpy()
    except (pa.ArrowException, TypeError) as error:
        raise DatasetError(
            f"{file}: `{name}` must hold integers, but is {column.type} ({error!s:.100}); {CURE}"
        ) from error
    return integers


def text_column(file: Path, table: Any, name: str) -> list[str]:
    """Return a column of text.

    Raises:
        DatasetError: A row holds no text.
    """
    column = _present(file, table, name)
    try:
        texts = column.to_pylist()
    except (ValueError, pa.ArrowException) as error:
        raise DatasetError(f"{file}: `{name}` is not text ({error}); {CURE}") from error
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            raise DatasetError(
                f"{file}, row {row}: `{name}` must be text, got {text!r:.100}; {CURE}"
            )
    return texts


@lru_cache(maxsize=4)
def picture_column(file: Path, name: str) -> Any:
    """Return a column of pictures, which are LeRobot's structs of bytes and a path.

    It is kept for the next call: the windows of an episode read the same file repeatedly.

    Raises:
        DatasetError: The file is missing or damaged, or lacks the column.
    """
    return read_table(file, [name])[name]


def vector_column(column: Any, size: int) -> np.ndarray:
    """Return a column of vectors, float32 [N, D].

    A vector is a list of D numbers; one of a single number may be stored as a plain number.

    Args:
        column: `pyarrow.ChunkedArray`.
        size: Numbers D of every vector.

    Raises:
        RowError: A row is empty, or has another number of numbers.
        TypeError: The column does not hold numbers that float32 can hold.
    """
    if column.null_count:
        row = column.is_null().to_pylist().index(True)
        raise RowError(row, "is empty")

    rows = len(column)
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], pa.float32())
    if isinstance(array, pa.ExtensionArray):
        array = array.storage
    if pa.types.is_nested(array.type):
        if not _is_list(array.type):
            raise TypeError(f"holds {array.type}, not lists of numbers")
        lengths = _list_lengths(array)
        wrong = np.flatnonzero(lengths != size)
        if len(wrong):
            row = int(wrong[0])
            raise RowError(row, f"has {lengths[row]} numbers, expected {size}")
        array = array.flatten()
    elif size != 1:
        raise TypeError(f"holds {array.type}, expected lists of {size} numbers")

    if array.null_count:
        position = array.is_null().to_pylist().index(True)
        raise RowError(position // size, f"lacks its number {position % size}")
    return _as_float32(array).reshape(rows, size)


def _as_float32(array: Any) -> np.ndarray:
    """Return an array of numbers as float32 [N]; integers must be represented exactly."""
    is_number = (
        pa.types.is_floating(array.type)
        or pa.types.is_integer(array.type)
        or pa.types.is_boolean(array.type)
    )
    if not is_number:
        raise TypeError(f"holds {array.type}, which are not numbers")
    numbers = array.to_numpy(zero_copy_only=False)
    with np.errstate(over="ignore"):
        values: np.ndarray = numbers.astype(np.float32)
    if np.issubdtype(numbers.dtype, np.integer) and (values.astype(object) != numbers).any():
        raise TypeError(f"holds integers ({array.type}) that float32 cannot hold")
    return values


def _is_list(kind: Any) -> bool:
    """Return whether an Arrow type is a list of any form."""
    return bool(
        pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    )


def _list_lengths(array: Any) -> np.ndarray:
    """Return the length of every list of an array, int [N]."""
    if pa.types.is_fixed_size_list(array.type):
        return np.full(len(array), array.type.list_size)
    return np.asarray(array.value_lengths().to_numpy(zero_copy_only=False))


def _present(file: Path, table: Any, name: str) -> Any:
    """Return a column that must be there."""
    if name not in table.column_names:
        raise DatasetError(f"{file} has no column {name}; {CURE}")
    return table[name]


def _footer(file: Path) -> Any:
    """Return the metadata at the end of a parquet file."""
    try:
        return pq.read_metadata(file)
    except (OSError, ValueError, TypeError, pa.ArrowException) as error:
        raise _unreadable(file, error) from error


def _unreadable(file: Path, error: Exception) -> DatasetError:
    """Return the error of a file that is damaged."""
    return DatasetError(f"{file} cannot be read ({error!s:.200}); {CURE}")
