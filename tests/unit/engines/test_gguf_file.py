"""GGUF files: what is read of them, and what is said of files that cannot be."""

from __future__ import annotations

import struct
from pathlib import Path

import numpy as np
import pytest

gguf = pytest.importorskip("gguf")

from gguf_files import BLOCKS, HEADS, KV_HEADS, VOCABULARY, WIDTH, random_tensors, write_model  # noqa: E402
from zotune.engines.gguf.file import GGUFFile, from_file_rows, to_file_rows  # noqa: E402


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("gguf") / "small.gguf")


def test_metadata_and_tensors_equal_the_official_readers(model: Path) -> None:
    file, official = GGUFFile(model), gguf.GGUFReader(model)
    values = {key: field.contents() for key, field in official.fields.items() if not key.startswith("GGUF.")}
    assert dict(file.metadata) == values
    assert list(file.tensors) == [tensor.name for tensor in official.tensors]
    for tensor in official.tensors:
        assert file.tensors[tensor.name].data.tobytes() == tensor.data.tobytes()
        assert file.tensors[tensor.name].shape == tuple(tensor.shape.tolist()[::-1])


def test_the_models_facts_are_read(model: Path) -> None:
    file = GGUFFile.open(model)
    assert (file.architecture, file.name, file.context_length, file.width, file.num_blocks) == ("llama", "small", 128, WIDTH, BLOCKS)
    assert (file.vocabulary_size, file.head, file.quantization, file.paths) == (VOCABULARY, "output.weight", "F32", [model])
    assert file.key_heads == (KV_HEADS, WIDTH // HEADS)


def test_matrices_come_by_block_with_checkpoint_names(model: Path) -> None:
    matrices = GGUFFile(model).matrices
    assert len(matrices) == 7 * BLOCKS
    assert [matrix.tensor for matrix in matrices] == sorted(matrix.tensor for matrix in matrices)
    by_name = {matrix.name: matrix for matrix in matrices}
    query, key, down = (by_name[f"model.layers.1.{name}"] for name in ("self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj"))
    assert (query.tensor, query.shape, query.heads) == ("blk.1.attn_q.weight", (WIDTH, WIDTH), HEADS)
    assert (key.shape, key.heads) == ((WIDTH // 2, WIDTH), KV_HEADS)
    assert (down.shape, down.heads) == ((WIDTH, 96), None)


@pytest.mark.parametrize(("architecture", "name"), [("qwen2", "model.layers.0.self_attn.q_proj"), ("falcon", "blk.0.attn_q")])
def test_only_llama_has_permuted_rows(tmp_path: Path, architecture: str, name: str) -> None:
    matrix = {each.tensor: each for each in GGUFFile(write_model(tmp_path / "m.gguf", architecture=architecture)).matrices}[
        "blk.0.attn_q.weight"
    ]
    assert (matrix.name, matrix.heads) == (name, None)


def test_a_tied_models_head_is_its_embedding(tmp_path: Path) -> None:
    file = GGUFFile(write_model(tmp_path / "m.gguf", random_tensors(tied=True)))
    assert (file.head, file.vocabulary_size) == ("token_embd.weight", VOCABULARY)


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q8_0", "Q4_0"])
def test_rows_equal_those_of_the_whole_dequantized(tmp_path: Path, kind: str) -> None:
    file = GGUFFile(write_model(tmp_path / "m.gguf", kind=kind))
    weight, ids = random_tensors()["output.weight"], [3, 0, 49, 3]
    whole = gguf.dequantize(gguf.quantize(weight, gguf.GGMLQuantizationType[kind]), gguf.GGMLQuantizationType[kind]).reshape(weight.shape)
    rows = file.rows("output.weight", ids)
    assert rows.dtype == np.float32
    np.testing.assert_array_equal(rows, whole[ids])
    assert file.quantization == kind


@pytest.mark.parametrize("ids", [[50], [-1], [0, 2**40]])
def test_rows_that_are_not_there_are_refused(model: Path, ids: list[int]) -> None:
    with pytest.raises(IndexError, match="has 50 rows"):
        GGUFFile(model).rows("output.weight", ids)


def test_rows_of_no_ids_are_an_empty_matrix(model: Path) -> None:
    assert GGUFFile(model).rows("output.weight", []).shape == (0, WIDTH)


def test_row_orders_are_inverse_and_pair_half_heads() -> None:
    rows = np.arange(16).reshape(16, 1)
    assert to_file_rows(rows, 2)[:, 0].tolist() == [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    assert (from_file_rows(to_file_rows(rows, 2), 2) == rows).all()
    assert to_file_rows(rows, None) is rows


def test_a_split_file_reads_as_the_whole(model: Path, tmp_path: Path) -> None:
    write_model(tmp_path / "small.gguf", split_max_tensors=7)
    parts = sorted(tmp_path.glob("*.gguf"))
    whole, split = GGUFFile(model), GGUFFile(parts[1])
    assert split.path == parts[0] and split.paths == parts and len(parts) > 2
    assert split.matrices == whole.matrices
    assert [(name, bytes(data)) for name, data in split.pieces()] == [(name, bytes(data)) for name, data in whole.pieces()]
    parts[2].unlink()
    with pytest.raises(ValueError, match=parts[2].name + ".* is missing"):
        GGUFFile(parts[0])


def test_a_part_under_another_parts_name_is_refused(tmp_path: Path) -> None:
    write_model(tmp_path / "small.gguf", split_max_tensors=10)
    parts = sorted(tmp_path.glob("*.gguf"))
    parts[1].write_bytes(parts[0].read_bytes())
    with pytest.raises(ValueError, match="is not part 2 of 3"):
        GGUFFile(parts[0])


def test_pieces_tell_any_changed_weight(model: Path, tmp_path: Path) -> None:
    tensors = random_tensors()
    tensors["blk.0.attn_q.weight"][0, 0] += 1
    changed = dict(GGUFFile(write_model(tmp_path / "m.gguf", tensors)).pieces())
    differing = [name for name, data in GGUFFile(model).pieces() if bytes(changed[name]) != bytes(data)]
    assert differing == ["blk.0.attn_q.weight|F32|64x64|"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "an empty file"),
        (struct.pack("<Q", 2) + b"{}", "safetensors.*zotune convert"),
        (b"PK\x03\x04", "PyTorch"),
        (b"<!DOCTYPE html>", "failed download"),
        (b"version https://git-lfs.github.com/spec/v1", "git lfs pull"),
        (b"GGUF", "truncated"),
        (b"GGUF" + struct.pack("<I", 1), "version 1"),
        (b"GGUF" + struct.pack(">I", 3) + bytes(16), "big-endian"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**63, 1), "counts 9223372036854775808 tensors"),
        (b"GGUF" + struct.pack("<IQQ", 3, 1, 2**40), "counts 1099511627776 entries"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**62) + bytes(99), "truncated"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 1) + struct.pack("<Q", 2**17) + bytes(2**18), "name in its header has 131072 bytes"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 8, 2**60) + bytes(99), "list of 1152921504606846976"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 4, 2**60) + bytes(99), "truncated"),
        (b"GGUF" + struct.pack("<IQQQ", 3, 0, 1, 1) + b"a" + struct.pack("<IIQ", 9, 9, 1) + bytes(99), "unknown type 9"),
        (b"GGUF" + struct.pack("<IQQ", 3, 0, 0) + bytes(64), "architecture|no language model"),
    ],
)
def test_what_is_no_gguf_is_named(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        GGUFFile(path)


def test_a_folder_and_a_missing_file_are_named(model: Path) -> None:
    with pytest.raises(ValueError, match=r"folder.*give the file small\.gguf"):
        GGUFFile(model.parent)
    with pytest.raises(ValueError, match="there is no such file"):
        GGUFFile(model.parent / "other.gguf")


def test_an_adapter_is_no_model(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.add_type("adapter")
    writer.add_tensor("blk.0.attn_q.weight.lora_a", np.zeros((1, 4), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="is an adapter, no model"):
        GGUFFile(tmp_path / "a.gguf")


def test_any_cut_of_a_file_is_told(model: Path, tmp_path: Path) -> None:
    whole, path = model.read_bytes(), tmp_path / "cut.gguf"
    for length in (4, 7, 20, 30, 100, 500, 1500, 3000, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="truncated"):
            GGUFFile(path)


def test_a_damaged_header_never_raises_another_error(model: Path, tmp_path: Path) -> None:
    whole, path, rng = model.read_bytes(), tmp_path / "damaged.gguf", np.random.default_rng(0)
    header = len(whole) - sum(len(data) for _, data in GGUFFile(model).pieces())
    refused = 0
    for _ in range(200):
        content = bytearray(whole)
        for place in rng.integers(4, header, rng.integers(1, 4)):
            content[place] = rng.choice([0, 1, 127, 255, rng.integers(256)])
        path.write_bytes(content)
        try:
            file = GGUFFile(path)
            dict(file.metadata), file.matrices, file.quantization, file.rows(file.head, [0])
        except ValueError as error:
            refused += 1
            assert len(str(error)) < 600
    assert refused > 100
