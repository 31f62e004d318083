"""Indexed files: what is written is read again, byte for byte as Megatron lays it out."""

import struct
from pathlib import Path

import numpy as np
import pytest

from mindspeed_llm.data.indexed_file import IndexedFile, IndexedFileWriter
from mindspeed_llm.errors import InputError


def write(prefix: Path, sequences: list[list[int]], dtype: type = np.int32) -> None:
    with IndexedFileWriter(prefix, dtype) as writer:
        for sequence in sequences:
            writer.add(np.array(sequence, dtype), [len(sequence)])


@pytest.mark.parametrize("dtype", [np.int32, np.uint16, np.int64])
def test_sequences_come_back(tmp_path: Path, dtype: type) -> None:
    sequences = [[1, 2, 3], [], [7], list(range(50))]
    write(tmp_path / "d", sequences, dtype)
    file = IndexedFile(tmp_path / "d")
    assert [file[i].tolist() for i in range(len(file))] == sequences
    assert file.dtype == dtype and file.documents.tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(IndexError):
        file[4]


def test_the_index_has_the_documented_bytes(tmp_path: Path) -> None:
    write(tmp_path / "d", [[5, 6], [7]])
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 2, 3) + struct.pack("<2i2q3q", 2, 1, 0, 8, 0, 1, 2)
    assert (tmp_path / "d.idx").read_bytes() == expected
    assert (tmp_path / "d.bin").read_bytes() == struct.pack("<3i", 5, 6, 7)


def test_megatrons_own_reader_reads_our_files(tmp_path: Path) -> None:
    indexed = pytest.importorskip("megatron.core.datasets.indexed_dataset")
    write(tmp_path / "d", [[5, 6], [7], [8, 9, 10]])
    theirs = indexed.IndexedDataset(str(tmp_path / "d"))
    assert [theirs[i].tolist() for i in range(3)] == [[5, 6], [7], [8, 9, 10]]
    assert theirs.document_indices.tolist() == [0, 1, 2, 3]


def test_upstreams_files_are_read(golden: Path) -> None:
    file = IndexedFile(golden / "cases" / "A_merge" / "out_text_document")
    assert file.lengths.sum() * 4 == (golden / "cases" / "A_merge" / "out_text_document.bin").stat().st_size


def test_an_empty_file_holds_no_sequence(tmp_path: Path) -> None:
    write(tmp_path / "d", [])
    assert len(IndexedFile(tmp_path / "d")) == 0


def test_missing_foreign_and_truncated_files_are_named(tmp_path: Path) -> None:
    write(tmp_path / "d", [[1, 2, 3], [4]])
    index, data = tmp_path / "d.idx", tmp_path / "d.bin"
    whole_index, whole_data = index.read_bytes(), data.read_bytes()
    data.write_bytes(whole_data[:-1])
    with pytest.raises(InputError, match=r"d\.bin holds 15 bytes, its index expects 16"):
        IndexedFile(tmp_path / "d")
    index.write_bytes(whole_index[:-1])
    with pytest.raises(InputError, match=r"d\.idx holds .* truncated"):
        IndexedFile(tmp_path / "d")
    index.write_bytes(b"something else entirely, but long enough")
    with pytest.raises(InputError, match="is not an indexed data file"):
        IndexedFile(tmp_path / "d")
    index.write_bytes(whole_index[:9] + struct.pack("<Q", 2) + whole_index[17:])
    with pytest.raises(InputError, match="version 2"):
        IndexedFile(tmp_path / "d")
    index.unlink()
    with pytest.raises(InputError, match=r"d\.idx is missing"):
        IndexedFile(tmp_path / "d")
