"""The final folder: whole tensors from the pieces of any ranks, in any form, in place of earlier ones, or not at all.

Must not know a model: the tensors are those of a tiny one, random.
"""

import errno
import json
import os

import folders
import pytest
import torch
from safetensors.torch import load_file
from states import ALONE, equal, in_a_process

from accessory.checkpoint import Form, open_folders
from accessory.checkpoint.boxes import Box, Piece
from accessory.checkpoint.operate import same_bits
from accessory.checkpoint.write import Papers
from accessory.train import final
from accessory.train.final import write_final
from spawn import run_ranks

FILE = "consolidated.00-of-01.model.safetensors"
PAPERS = Papers(folders.CONFIG, {"llama_type": "llama"})


def held(ranks, tensors):
    """What a rank of a tensor-parallel x FSDP run holds of a model."""
    pieces = {}
    for name, tensor in tensors.items():
        box, dim = Box.whole(tensor.shape), folders.CUT.get(name.split(".")[-2])
        if dim is not None:
            size = -(-tensor.shape[dim] // ranks.shard.size)
            box = box.rows(ranks.shard.rank * size, (ranks.shard.rank + 1) * size, dim=dim)
        size = -(-box.size[0] // ranks.dp_size)
        box = box.rows(ranks.dp_rank * size, (ranks.dp_rank + 1) * size)
        part = tensor[box.inside(Box.whole(tensor.shape))].clone()
        pieces[name] = Piece(box, part, dim is not None or ranks.leader)
    return pieces


def read(folder):
    opened = open_folders(folder)
    return dict(opened.tensors(opened.cuts()))


def finish(ranks, folder, form, papers=PAPERS):
    write_final(folder, held(ranks, folders.state()), form=form, papers=papers, ranks=ranks)


@pytest.mark.parametrize(("n", "tp"), [(1, 1), (2, 2), (2, 1), (4, 2)])
def test_the_pieces_of_any_ranks_become_whole_tensors(tmp_path, n, tp):
    spm = tmp_path / "tokenizer.model"
    spm.write_bytes(b"pieces")
    papers = Papers(folders.CONFIG, {"llama_type": "llama"}, spm)
    run_ranks(finish, n, tmp_path / "final", Form(shards=2), papers, tp=tp)
    opened = open_folders(tmp_path / "final")
    assert equal(dict(opened.tensors(opened.cuts())), folders.state())
    assert opened.config == folders.CONFIG and opened.meta == {"llama_type": "llama"}
    assert opened.tokenizer == tmp_path / "final" / "tokenizer.model"
    assert sorted(os.listdir(tmp_path)) == ["final", "tokenizer.model"]


@pytest.mark.parametrize("fmt", ["safetensors", "pth"])
def test_floats_are_cast_and_written_in_the_form_asked_for(tmp_path, fmt):
    run_ranks(finish, 2, tmp_path / "final", Form(fmt=fmt, dtype=torch.bfloat16), tp=1)
    assert equal(read(tmp_path / "final"), {name: tensor.bfloat16() for name, tensor in folders.state().items()})
    assert (tmp_path / "final" / f"consolidated.00-of-01.model.{fmt}").is_file()


def test_only_what_is_given_is_written_and_opens_behind_its_base(tmp_path):
    base = folders.meta(tmp_path / "base", folders.state())
    trained = {"norm.weight": Piece(Box.whole((folders.DIM,)), torch.full((folders.DIM,), 5.0))}
    write_final(tmp_path / "final", trained, form=Form(), papers=PAPERS, ranks=ALONE)
    assert list(load_file(tmp_path / "final" / FILE)) == ["llma.norm.weight"]
    opened = open_folders([base, tmp_path / "final"])
    assert same_bits(dict(opened.tensors(opened.cuts()))["norm.weight"], torch.full((folders.DIM,), 5.0))


# ---- where something is already


def test_earlier_weights_are_moved_aside_and_other_files_stay(tmp_path):
    (tmp_path / "trainer_log.jsonl").write_text("{}")
    finish(ALONE, tmp_path, Form(shards=2))
    finish(ALONE, tmp_path, Form(dtype=torch.bfloat16))
    assert sorted(os.listdir(tmp_path)) == [
        "config.json",
        FILE,
        "manifest.json",
        "meta.json",
        "previous-1",
        "trainer_log.jsonl",
    ]
    assert equal(read(tmp_path / "previous-1"), folders.state())
    assert read(tmp_path)["norm.weight"].dtype == torch.bfloat16


def test_the_same_weights_once_more_move_nothing(tmp_path):
    for _ in range(2):
        finish(ALONE, tmp_path, Form())
    assert sorted(os.listdir(tmp_path)) == ["config.json", FILE, "manifest.json", "meta.json"]


KILL_AT_RENAMES = """
import json, os, signal, sys
import torch
from accessory.checkpoint import Form
from states import ALONE
from test_train_final import finish, read

def die_at(number):
    real, seen = os.rename, []
    def rename(*args, **kwargs):
        seen.append(args)
        if len(seen) == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args, **kwargs)
    os.rename = rename

outcomes, number, ended = [], 0, False
while not ended:
    number += 1
    folder = f"{sys.argv[1]}/{number}"
    os.mkdir(folder)
    finish(ALONE, folder, Form())
    child = os.fork()
    if child == 0:
        die_at(number)
        finish(ALONE, folder, Form(dtype=torch.bfloat16))
        os._exit(0)
    ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    try:
        outcomes.append(str(read(folder)["norm.weight"].dtype))
    except ValueError as error:
        assert "cut short" in str(error), error
        outcomes.append("refused")
    finish(ALONE, folder, Form(dtype=torch.float16))
    assert read(folder)["norm.weight"].dtype == torch.float16
    assert not [name for name in os.listdir(folder) if name == ".final" or name == ".unfinished"]
print(json.dumps(outcomes))
"""


def test_a_kill_at_any_rename_leaves_weights_that_open_or_a_refusal_and_the_next_try_succeeds(tmp_path):
    outcomes = json.loads(in_a_process(KILL_AT_RENAMES, str(tmp_path)).splitlines()[-1])
    assert len(outcomes) > 5 and set(outcomes) == {"torch.float32", "refused", "torch.bfloat16"}
    assert outcomes[0] == "torch.float32" and outcomes[-1] == "torch.bfloat16"


# ---- what goes wrong is known to all


def refusal(ranks, folder, form, change):
    """The sentence of every rank."""
    pieces = held(ranks, folders.state())
    change(ranks, pieces)
    with pytest.raises((ValueError, OSError)) as caught:
        write_final(folder, pieces, form=form, papers=PAPERS, ranks=ranks)
    return str(caught.value)


def drop_rows(ranks, pieces):
    if ranks.rank == 1:
        pieces["output.weight"].mine = False


def retype(ranks, pieces):
    if ranks.rank == 1:
        pieces["output.weight"].tensor = pieces["output.weight"].tensor.bfloat16()


def enlarge(ranks, pieces):
    pieces["layers.1.feed_forward.w2.weight"].tensor[0, 0] = 1e5


def fill_the_disk(ranks, pieces):
    def pwrite(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    if ranks.rank == 0:
        os.pwrite = pwrite


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop_rows, "the ranks do not hold whole tensors: output.weight [17:33, 0:16] of (33, 16)"),
        (retype, "the ranks do not hold whole tensors: output.weight in several shapes or dtypes"),
        (enlarge, "layers.1.feed_forward.w2.weight: holds 100000, which fp16 cannot"),
        (fill_the_disk, "the disk is full"),
    ],
)
def test_what_one_rank_finds_wrong_every_rank_raises_and_nothing_is_left(tmp_path, change, words):
    form = Form(dtype=torch.float16)
    first, second = run_ranks(refusal, 2, tmp_path / "final", form, change, tp=1)
    assert words in first and first == second and os.listdir(tmp_path) == []


def test_a_form_that_cannot_be_is_refused_on_every_rank(tmp_path):
    first, second = run_ranks(refusal, 2, tmp_path / "final", Form(shards=20), nothing, tp=1)
    assert "cannot be cut into 20 shards" in first and first == second and os.listdir(tmp_path) == []


def nothing(ranks, pieces):
    """Change nothing."""


# ---- memory


def used():
    """Bytes of memory that no file backs."""
    with open("/proc/self/status") as file:
        return 1024 * sum(int(line.split()[1]) for line in file if line.startswith(("RssAnon", "RssShmem")))


def grow(ranks, folder):
    """How far rank 0's memory grows while 8 tensors of 40 MiB pass through it."""
    box = Box.whole((10, 1 << 20)).rows(5 * ranks.rank, 5 * ranks.rank + 5)
    pieces = {f"layers.{i}.attention.wq.weight": Piece(box, torch.full(box.size, float(i))) for i in range(8)}
    torch.distributed.barrier()
    before, seen, real = used(), [], final.FolderWriter.put

    def put(self, key, tensor):
        real(self, key, tensor)
        seen.append(used() - before)

    final.FolderWriter.put = put
    write_final(folder, pieces, form=Form(), papers=PAPERS, ranks=ranks)
    return max(seen, default=0)


def test_gathering_takes_the_memory_of_a_few_tensors(tmp_path):
    assert run_ranks(grow, 2, tmp_path / "final", tp=1)[0] <= 2 * (40 << 20) < 8 * (40 << 20) / 2
