"""Training processes index tar shards together: each shard is scanned once, and the pairs are those of one process."""

import io
import tarfile
from pathlib import Path

import pytest
import torch.distributed as dist
from PIL import Image

from pretrain.config import DataConfig
from pretrain.data import shard_index
from pretrain.data.pairs import load_pairs
from pretrain.data.shards import ShardOrder
from pretrain.engine.processes import Processes

SIZES = (3, 5, 4, 6, 2, 7, 5)


def write_shards(folder: Path) -> str:
    """Shards of SIZES pairs, numbered through by their captions."""
    folder.mkdir()
    picture = io.BytesIO()
    Image.new("RGB", (8, 8)).save(picture, "JPEG")
    for shard, count in enumerate(SIZES):
        first = sum(SIZES[:shard])
        with tarfile.open(folder / f"{shard}.tar", "w") as archive:
            for number in range(first, first + count):
                for ending, content in (("jpg", picture.getvalue()), ("txt", f"caption {number}".encode())):
                    member = tarfile.TarInfo(f"{number:04d}.{ending}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
    return f"{folder}/{{0..{len(SIZES) - 1}}}.tar"


def index(pattern: str, log: str) -> dict:
    """What one process finds; the shards that are scanned are written to the log, with the rank."""
    together = Processes(dist.get_rank(), dist.get_world_size(), kind="torch") if dist.is_initialized() else None
    original, rank = shard_index.scan_shard, together.rank if together else 0

    def scan(path: Path) -> shard_index.ShardIndex:
        with open(log, "a") as file:
            file.write(f"{rank} {path.name}\n")
        return original(path)

    shard_index.scan_shard = scan  # started processes are forks: they have it too
    try:
        pairs = load_pairs(DataConfig(shards=pattern), [], together)
    finally:
        shard_index.scan_shard = original
    source = pairs.training
    rows = ShardOrder(source.sizes, 8, 3).rows(0, 0, len(source)).tolist()
    captions = [source.read(row)[1]["captions"][0] for row in rows]
    return {"sizes": source.sizes.tolist(), "captions": captions, "notes": pairs.notes, "print": source.fingerprint()}


@pytest.mark.parametrize("kept", [0, 3])
def test_each_shard_is_scanned_once_and_the_order_is_that_of_one_process(tmp_path, run_processes, kept):
    alone = index(write_shards(tmp_path / "alone"), str(tmp_path / "alone.txt"))
    pattern, log = write_shards(tmp_path / "together"), tmp_path / "together.txt"
    for shard in range(kept):  # as an earlier run left them
        shard_index.load_index(tmp_path / "together" / f"{shard}.tar")
    found = run_processes(index, pattern, str(log))
    assert found == [alone, alone] and alone["sizes"] == list(SIZES)
    ranks, names = zip(*(line.split() for line in log.read_text().splitlines()), strict=True)
    assert sorted(names) == [f"{shard}.tar" for shard in range(kept, len(SIZES))] and set(ranks) == {"0", "1"}
    assert len((tmp_path / "alone.txt").read_text().splitlines()) == len(SIZES)
