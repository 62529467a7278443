"""tools/generate_packed_data.py and what training makes of its files.

Must not look at conversations.
"""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import safetensors
from feed_toys import config, corpus, texts, tokenizer, write_jsonl

from accessory.data.feed import Feed, build
from accessory.data.feed.packed import PackJob, write_packed

ROOT = Path(__file__).resolve().parents[1]


def tool():
    spec = importlib.util.spec_from_file_location("packing", ROOT / "tools/generate_packed_data.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def text(tmp_path, count: int = 30) -> Path:
    rows = [{"text": f"document {number} " + "a quick fox " * (number % 17)} for number in range(count)]
    return write_jsonl(tmp_path / "a.jsonl", rows)


def packed(tmp_path, **more) -> Path:
    job = {"max_len": 64, "workers": 0, **more}
    write_packed(PackJob([str(text(tmp_path))], str(tokenizer().path), str(tmp_path / "packed"), **job))
    return tmp_path / "packed"


def open_packed(path, tmp_path, **more):
    return corpus(path, cache=tmp_path / "cache", **{"stage": "pt", "cutoff_len": 64, **more})


def documents(found) -> list[list[int]]:
    """The documents of all rows, sorted."""
    out = []
    for index in range(len(found)):
        row = found.row(index)
        out += [part.tolist() for part in np.split(row.ids, row.documents[1:])]
    return sorted(out)


def test_the_tool_writes_what_training_reads(tmp_path):
    argv = [
        "--input",
        str(text(tmp_path)),
        "--tokenizer_path",
        str(tokenizer().path),
        "--output",
        str(tmp_path / "out"),
    ]
    tool().main([*argv, "--max_len", "64", "--workers", "0"])
    found = open_packed(tmp_path / "out", tmp_path)
    plain = open_packed(tmp_path / "a.jsonl", tmp_path)
    assert documents(found) == documents(plain) and found.lengths.max() <= 64
    assert found.lengths.sum() / len(found) / 64 > 0.95 and found.targets.sum() == plain.targets.sum()


def test_a_packed_row_is_a_sequence_of_documents_that_do_not_see_each_other(tmp_path):
    found = open_packed(packed(tmp_path), tmp_path)
    for packing in (True, False):
        own = config(cache=tmp_path, stage="pt", cutoff_len=64, packing=packing)
        steps = Feed(found, own, batch=2, accumulation=1, dp_rank=0, dp_size=1, seed=0)
        targets = 0
        for (batch,), _ in zip(steps, range(steps.steps_per_epoch), strict=False):
            targets += batch.targets
            if batch.segments is None:
                assert not packing and batch.positions.diff(dim=1).eq(1).all()
                continue
            starts = batch.positions.eq(0) & batch.segments.ge(1)
            assert starts.sum() == sum(batch.segments.amax(dim=1).clamp(min=0))
            assert (batch.labels.roll(1, 1)[:, 1:][starts[:, 1:]] == -100).all()
        assert targets == found.targets.sum()


def test_a_shorter_cutoff_cuts_documents_again(tmp_path):
    folder = packed(tmp_path)
    found, plain = (
        open_packed(folder, tmp_path, cutoff_len=20),
        open_packed(tmp_path / "a.jsonl", tmp_path, cutoff_len=20),
    )
    assert found.lengths.max() == 20 and found.targets.sum() == plain.targets.sum()


def test_the_file_is_a_safetensors_file_that_anyone_can_open(tmp_path):
    (path,) = packed(tmp_path).glob("*.packed")
    with safetensors.safe_open(path, "numpy") as file:
        assert set(file.keys()) == {"ids", "starts", "rows"} and file.metadata()["tokenizer"] == tokenizer().digest
        assert file.get_tensor("starts")[-1] == len(file.get_tensor("ids"))


def test_files_do_not_depend_on_the_number_of_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "ALONE", 0)
    path = text(tmp_path, 300)
    write_jsonl(path, [json.loads(line) | {"junk": "x" * 8000} for line in path.read_text().splitlines()])
    told = []
    for workers in (0, 2):
        out = tmp_path / f"out{workers}"
        write_packed(
            PackJob([str(path)], str(tokenizer().path), str(out), max_len=64, workers=workers, file_tokens=2000)
        )
        told.append([(file.name, file.read_bytes()) for file in sorted(out.iterdir())])
    assert told[0] == told[1] and len(told[0]) > 2


def test_another_tokenizer_is_refused(tmp_path):
    folder = packed(tmp_path)
    with pytest.raises(ValueError, match="its ids are of another tokenizer"):
        open_packed(folder, tmp_path, kind="llama3")


def test_packed_text_is_for_pretraining(tmp_path):
    folder = packed(tmp_path)
    with pytest.raises(ValueError, match="set stage to pt"):
        open_packed(folder, tmp_path, stage="sft")


def test_a_damaged_packed_file_is_named(tmp_path):
    (path,) = packed(tmp_path).glob("*.packed")
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"part-00000\.packed: its bytes are not those that were written"):
        open_packed(path, tmp_path)
    path.write_bytes(data[:-5])
    with pytest.raises(ValueError, match=r"part-00000\.packed: is no file of rows"):
        open_packed(path, tmp_path)


def test_nothing_is_replaced_and_nothing_half_done_stays(tmp_path):
    folder = packed(tmp_path)
    with pytest.raises(ValueError, match="is there already"):
        packed(tmp_path)
    (tmp_path / "b.jsonl").write_text('{"text": "x"}\nno json\n')
    job = PackJob([str(tmp_path / "b.jsonl")], str(tokenizer().path), str(tmp_path / "half"), workers=0)
    with pytest.raises(ValueError, match=r"b\.jsonl:2: is no JSON"):
        write_packed(job)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "b.jsonl", "packed"] and folder.is_dir()


def test_a_column_is_named_or_missed(tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", [{"body": "hello world"}])
    job = {"tokenizer_path": str(tokenizer().path), "max_len": 64, "workers": 0}
    write_packed(PackJob([str(path)], output=str(tmp_path / "one"), column="body", **job))
    assert texts(open_packed(tmp_path / "one", tmp_path)) == ["hello world"]
    with pytest.raises(ValueError, match="got the fields body, expected text or content"):
        write_packed(PackJob([str(path)], output=str(tmp_path / "two"), **job))


def test_packed_rows_obey_ratio_and_max_samples(tmp_path):
    from accessory.data.feed import Source

    folder = packed(tmp_path)
    whole = open_packed(folder, tmp_path)
    assert len(open_packed(folder, tmp_path, max_samples=3)) == 3
    assert len(open_packed(Source(str(folder), ratio=0.5), tmp_path)) == round(len(whole) / 2)


def test_the_help_names_every_flag(capsys):
    with pytest.raises(SystemExit):
        tool().main(["--help"])
    told = capsys.readouterr().out
    assert all(f"--{name} " in told for name in ("input", "tokenizer_path", "output", "max_len", "column", "workers"))
