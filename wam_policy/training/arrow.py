"""pyarrow, or the error that says how to install it."""

from wam_policy.errors import MissingExtraError

try:
    import pyarrow as pa
    import pyarrow.parquet as pq
except ImportError as error:
    raise MissingExtraError("pyarrow", "train") from error

__all__ = ["pa", "pq"]
