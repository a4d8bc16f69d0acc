"""Embed on the CPU backend: dequantizes the rows of a table, which stays as it is in the file.

embed.c handles the types that the kernels know, numpy the others.  EmbeddingStruct mirrors embed.c.
"""

import ctypes

import numpy as np

from llmsrv.backend.arrays import Array
from llmsrv.backend.cpu.library import FORMATS
from llmsrv.backend.cpu.library import address_of
from llmsrv.backend.cpu.library import float32
from llmsrv.backend.cpu.library import int32
from llmsrv.backend.cpu.library import pointer
from llmsrv.backend.program import Embed
from llmsrv.backend.quants.ggml_types import dequantize


class EmbeddingStruct(ctypes.Structure):
    """Embedding of embed.c."""

    _fields_ = [
        ("format", int32),
        ("columns", int32),
        ("table", pointer),
        ("row_bytes", ctypes.c_int64),
        ("out", pointer),
        ("out_stride", ctypes.c_int64),
        ("scale", float32),
        ("ids", pointer),
        ("sampled", pointer),
    ]


class Embedding:
    def __init__(
        self, library: ctypes.CDLL, embed: Embed, ids: Array, sampled: Array, out: Array
    ) -> None:
        """ids [max_rows] and out [max_rows, stride] are those of the step; sampled [max_logit_rows]
        are the ids that were drawn last.  None of them ever moves."""
        rows, columns = embed.table.shape
        self._call = library.llmsrv_embed
        self._table = embed.table.data.reshape(rows, -1)
        self._type, self._scale = embed.table.type, np.float32(embed.scale)
        self._ids, self._sampled, self._out = ids, sampled, out[:, :columns]
        self._struct = EmbeddingStruct(
            format=FORMATS.get(embed.table.type, -1),
            columns=columns,
            table=address_of(self._table),
            row_bytes=self._table.shape[1],
            out=address_of(out),
            out_stride=out.shape[1],
            scale=embed.scale,
            ids=address_of(ids),
            sampled=address_of(sampled),
        )
        self._at = ctypes.addressof(self._struct)

    def __call__(self, num_rows: int) -> None:
        if self._type in FORMATS:
            self._call(self._at, num_rows)
            return
        ids = self._ids[:num_rows]
        ids = np.where(ids < 0, np.maximum(self._sampled, 0)[np.maximum(-1 - ids, 0)], ids)
        values = np.empty((num_rows, self._out.shape[1]), np.float32)
        dequantize(self._type, self._table[ids].reshape(-1), values)
        np.multiply(values, self._scale, out=self._out[:num_rows])
