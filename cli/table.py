"""Rows into a Parquet file, a group at a time. The file appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from cli.rows import Row
from service.engine.local import LocalGate

ROWS_PER_GROUP = 2048


class Table:
    """An open Parquet file: path, embedding, p_value, score, flagged, error."""

    def __init__(self, file: Path, gate: LocalGate) -> None:
        self._dim = gate.manifest.embedding_dim
        self._schema = pa.schema(
            [
                pa.field("path", pa.string(), nullable=False),
                pa.field("embedding", pa.list_(pa.float32(), self._dim)),
                pa.field("p_value", pa.float64()),
                pa.field("score", pa.float32()),
                pa.field("flagged", pa.bool_()),
                pa.field("error", pa.string()),
            ],
            metadata={
                "twogate.bundle": gate.manifest.name,
                "twogate.version": str(gate.manifest.version),
                "twogate.digest": gate.manifest.digest,
                "twogate.model_sha256": gate.model_sha256,
                "twogate.detector": gate.manifest.detector.name,
                "twogate.max_fpr": repr(gate.max_fpr),
            },
        )
        # Opened here: Arrow takes no path that is not UTF-8, and takes one with a colon for an address.
        self._file = file.open("wb")
        self._writer = pq.ParquetWriter(self._file, self._schema, compression="zstd")
        self._rows: list[Row] = []

    def append(self, row: Row) -> None:
        """Add a row; a full group is written at once."""
        self._rows.append(row)
        if len(self._rows) >= ROWS_PER_GROUP:
            self._flush()

    def close(self) -> None:
        """Write what is left, and the file's end."""
        try:
            if self._rows:
                self._flush()
        finally:
            self._writer.close()
            self._file.close()

    def _flush(self) -> None:
        values = np.zeros((len(self._rows), self._dim), np.float32)
        for index, row in enumerate(self._rows):
            if row.judged is not None:
                values[index] = row.judged.embedding
        absent = pa.array([row.judged is None for row in self._rows])
        verdicts = [None if row.judged is None else row.judged.verdict for row in self._rows]
        columns = [
            pa.array([row.path for row in self._rows], pa.string()),
            pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), self._dim, mask=absent),
            pa.array([None if verdict is None else verdict.p_value for verdict in verdicts], pa.float64()),
            pa.array([None if verdict is None else verdict.score for verdict in verdicts], pa.float32()),
            pa.array([None if verdict is None else verdict.flagged for verdict in verdicts], pa.bool_()),
            pa.array([row.error for row in self._rows], pa.string()),
        ]
        self._writer.write_table(pa.Table.from_arrays(columns, schema=self._schema))
        self._rows = []


@contextmanager
def writing(output: Path, gate: LocalGate) -> Iterator[Table]:
    """A table that is written beside `output` and takes its place at the end; nothing is left where this fails."""
    # Hidden, so that a folder that is read and written at a time never sees it.
    beside = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        table = Table(beside, gate)
        try:
            yield table
        finally:
            table.close()
        beside.replace(output)
    finally:
        beside.unlink(missing_ok=True)
