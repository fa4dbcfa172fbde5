"""Checkpoints in folders: whole or not at all, for any number of ranks, and strict on what fits."""

from __future__ import annotations

import json
import multiprocessing as mp
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import saving_cases as cases
import torch
import workers
from catalogue import small_shampoo
from test_checkpoint import check_same, nested, through_a_file, trained
from torch import Tensor
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.distributed.checkpoint.state_dict_loader import load

import shampoo_func as sf
from shampoo_func.checkpoint import Checkpoint, files
from shampoo_func.checkpoint.__main__ import main as inspect
from shampoo_func.errors import CheckpointError, HyperparameterError
from shampoo_func.sharding.folders import read_folder


def made(path: Path, **options: Any) -> tuple[sf.Transformation, Any, Any]:
    """Save a small optimizer, and return transformation, state and parameters."""
    tx, params = small_shampoo(momentum=0.5), nested()
    state = trained(tx, params)
    sf.save_checkpoint(path, tx, state, params, **options)
    return tx, state, params


# One process ------------------------------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_everything_comes_back_bit_for_bit(tmp_path: Path, packed: bool) -> None:
    """Parameters of any container, dtype and strides; the state; tensors and plain data."""
    extra: dict[str, Any] = {
        "step": 7,
        "schedule": {"name": "cosine", "rates": [0.1, 0.2]},
        "rng": torch.get_rng_state(),
        "none": None,
    }
    tx, state, params = made(tmp_path / "a", extra=extra, pack_symmetric=packed)
    loaded = sf.load_checkpoint(tmp_path / "a", tx, sf.tree.map(torch.zeros_like, params))
    check_same(loaded.state, state)
    check_same(loaded.params, params)
    assert torch.equal(loaded.extra.pop("rng"), extra.pop("rng"))
    assert loaded.extra == extra


def test_a_bare_tensor(tmp_path: Path) -> None:
    """A parameter without a tree."""
    tx, params = small_shampoo(momentum=0.5), torch.randn(4, 3)
    state = trained(tx, params)
    sf.save_checkpoint(tmp_path / "a", tx, state, params)
    check_same(sf.load_checkpoint(tmp_path / "a", tx, params), Checkpoint(params, state, {}))


@pytest.mark.filterwarnings("ignore:torch.distributed is:UserWarning")
def test_torch_reads_the_folder(tmp_path: Path) -> None:
    """It is an ordinary folder of torch.distributed.checkpoint."""
    tx, state, params = made(tmp_path / "a")
    wanted = sf.to_state_dict(tx, state, params)
    found: dict[str, Any] = {key: torch.empty_like(leaf) for key, leaf in wanted.items()}
    load(found, checkpoint_id=tmp_path / "a")
    check_same(found, wanted)
    dcp_to_torch_save(tmp_path / "a", tmp_path / "a.pt")
    saved = torch.load(tmp_path / "a.pt", weights_only=True)
    check_same(sf.from_state_dict(tx, params, saved), state)


def other(**options: Any) -> Callable[[], tuple[sf.Transformation, Any]]:
    return lambda: (small_shampoo(**{"momentum": 0.5, **options}), nested())


def with_params(change: Callable[[Any], Any]) -> Callable[[], tuple[sf.Transformation, Any]]:
    return lambda: (small_shampoo(momentum=0.5), change(nested()))


def narrower(params: Any) -> Any:
    params["list"][0] = params["list"][0].float()
    return params


def renamed(params: Any) -> Any:
    params["layer"]["bias"] = params["layer"].pop("b")
    return params


def longer(params: Any) -> Any:
    params["layer"]["b"] = torch.ones(4)
    return params


def merged_up_to(number: int) -> tuple[sf.Transformation, Any]:
    return sf.chain(precondition=sf.blocked(sf.trace(0.5), block_size=3, merge_to=number)), nested()


MISFITS: dict[str, tuple[Callable[[], tuple[sf.Transformation, Any]], str]] = {
    "dtype": (
        with_params(narrower),
        r"'state/precondition/list\.0/b0_0/.* is .* float64, expected .* float32",
    ),
    "shape": (with_params(longer), r"'params/layer\.b' is \(3,\) float32, expected \(4,\) float32"),
    "name": (with_params(renamed), r"missing: 'params/layer\.bias'.*unexpected: 'params/layer\.b'"),
    "stage": (other(momentum=0.0), r"unexpected: 'state/.*trace/trace"),
    "block size": (other(block_size=4), r"'precondition' was saved with block_size=3, .*size=4"),
    "merging": (other(merge_dims=False), r"merge_dims=True.*but has.*merge_dims=False"),
    "merge rule": (lambda: merged_up_to(2), r"merge_to=None, but has .*merge_to=2"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_are_named_before_anything_is_read(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Torch itself would cast another dtype silently; here nothing but the description is read."""
    made(tmp_path / "a")
    make, message = MISFITS[name]
    tx, params = make()
    read: list[str] = []
    really = read_folder

    def watched(folder: Path, into: Any) -> None:
        read.extend(into)
        really(folder, into)

    monkeypatch.setattr(files, "read_folder", watched)
    with pytest.raises(CheckpointError, match=message):
        sf.load_checkpoint(tmp_path / "a", tx, params)
    assert read == ["metadata"]


def test_state_of_another_dtype_is_named(tmp_path: Path) -> None:
    """A leaf of the state, with the key and both dtypes."""
    tx, params = sf.trace(0.9), {"w": torch.ones(2)}
    sf.save_checkpoint(tmp_path / "a", tx, tx.init(params), params)
    narrow = sf.trace(0.9, dtype=torch.bfloat16)
    with pytest.raises(CheckpointError, match=r"state/trace/w' is \(2,\) float32, .* bfloat16"):
        sf.load_checkpoint(tmp_path / "a", narrow, params)


def empty_marker(path: Path) -> None:
    (path / "complete.json").write_text("{}")


def cut(path: Path) -> None:
    os.truncate(path / "__0_0.distcp", 100)


def scrambled(path: Path) -> None:
    """Keep the size, and lose what is in it."""
    size = (path / ".metadata").stat().st_size
    (path / ".metadata").write_bytes(b"x" * size)


def zeroed(path: Path) -> None:
    size = (path / "__0_0.distcp").stat().st_size
    (path / "__0_0.distcp").write_bytes(bytes(size))


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "folder": (shutil.rmtree, "there is no folder"),
    "marker": (lambda path: (path / "complete.json").unlink(), r"no 'complete\.json'"),
    "empty marker": (empty_marker, r"complete\.json' cannot be read \(KeyError"),
    "file": (lambda path: (path / "__0_0.distcp").unlink(), "'__0_0.distcp' is missing"),
    "description": (lambda path: (path / ".metadata").unlink(), "'.metadata' is missing"),
    "half a file": (cut, r"'__0_0\.distcp' has 100 bytes, not \d+"),
    "description scrambled": (scrambled, r"\.metadata' \(UnpicklingError"),
    "zeros": (zeroed, "it is damaged"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(tmp_path: Path, name: str) -> None:
    """Nothing that is not whole is loaded, and an earlier step is the latest then."""
    tx, _, params = made(sf.checkpoint_path(tmp_path, 5))
    path = sf.checkpoint_path(tmp_path, 10)
    made(path)
    assert sf.latest_checkpoint(tmp_path) == path
    damage, message = DAMAGE[name]
    damage(path)
    with pytest.raises(CheckpointError, match=message):
        sf.load_checkpoint(path, tx, params)
    if name not in ("description scrambled", "zeros"):  # which only reading finds
        assert sf.latest_checkpoint(tmp_path) == sf.checkpoint_path(tmp_path, 5)


def test_checkpoints_are_not_overwritten(tmp_path: Path) -> None:
    """A folder that exists is refused, and stays as it is; leftovers of the dead do not matter."""
    tx, state, params = made(tmp_path / "a", extra={"step": 1})
    with pytest.raises(CheckpointError, match="never overwritten"):
        sf.save_checkpoint(tmp_path / "a", tx, state, params)
    assert sf.load_checkpoint(tmp_path / "a", tx, params).extra == {"step": 1}
    (tmp_path / ".b.partial").mkdir()
    (tmp_path / ".b.partial" / ".metadata").write_text("of another run")
    made(tmp_path / "b")
    assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"odd": object()}, r"extra\['odd'\] is neither a tensor nor plain data"),
        ({3: 1}, "the name 3"),
        ({"a/json": 1}, "does not end in '/json'"),
    ],
)
def test_extras_that_cannot_be_saved(tmp_path: Path, extra: Any, message: str) -> None:
    """A typed error, and nothing is left behind."""
    with pytest.raises(CheckpointError, match=message):
        made(tmp_path / "a", extra=extra)
    assert list(tmp_path.iterdir()) == []


def test_parameters_of_one_path_are_refused(tmp_path: Path) -> None:
    """Two parameters would have one name."""
    params = {"a.b": torch.ones(1), "a": {"b": torch.ones(1)}}
    with pytest.raises(CheckpointError, match=r"'[^']*a\.b[^']*'"):
        sf.save_checkpoint(tmp_path / "a", sf.scale(1.0), sf.scale(1.0).init(params), params)


def test_a_full_disk_is_a_typed_error(tmp_path: Path) -> None:
    """The system's own error is told, the started folder is removed."""
    with cases.full_disk(True), pytest.raises(CheckpointError, match="write the checkpoint: OSErr"):
        made(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_steps_have_names_in_order(tmp_path: Path) -> None:
    """The latest is that of the greatest number, whatever else lies there."""
    assert sf.latest_checkpoint(tmp_path) is None
    for step in (9, 100_000_000, 20):
        made(sf.checkpoint_path(tmp_path, step))
    sf.checkpoint_path(tmp_path, 10**9).mkdir()
    (tmp_path / "step_7").write_text("")
    assert sf.latest_checkpoint(tmp_path) == tmp_path / "step_100000000"
    with pytest.raises(HyperparameterError, match="step"):
        sf.checkpoint_path(tmp_path, -1)


def test_saving_in_the_background(tmp_path: Path) -> None:
    """What is overwritten meanwhile is saved as it was; errors come with the result."""
    tx, params = small_shampoo(momentum=0.5), nested()
    state = trained(tx, params)
    own = torch.ones(3)
    wanted = sf.tree.map(torch.clone, (params, state))
    saving = sf.save_checkpoint_async(tmp_path / "a", tx, state, params, extra={"own": own})
    for leaf in sf.tree.leaves((params, state, own)):
        leaf.zero_()
    loaded = sf.load_checkpoint(saving.result(), tx, params)
    check_same((loaded.params, loaded.state), wanted)
    assert torch.equal(loaded.extra["own"], torch.ones(3))
    again = sf.save_checkpoint_async(tmp_path / "a", tx, state, params)
    with pytest.raises(CheckpointError, match="never overwritten"):
        again.result()


# Killed -----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("by", ["call", "sync"])
def test_killed_at_every_file_call(tmp_path: Path, by: str) -> None:
    """Before any open, mkdir, rename or sync: the step before loads, this one is there or not."""
    with ProcessPoolExecutor(1, mp_context=mp.get_context("forkserver")) as own:
        found = own.submit(cases.die_everywhere, str(tmp_path), by).result(100)
    ends = [end for end, _ in found]
    assert ends == [signal.SIGKILL] * (len(found) - 1) + [0]
    states = [state for _, state in found]
    # at first the new checkpoint is absent, and after the rename, the last call but one, whole
    assert states.count("absent") >= 4
    assert states == ["absent"] * states.count("absent") + ["whole"] * states.count("whole")


@pytest.mark.slow
def test_killed_at_any_time(tmp_path: Path) -> None:
    """A process that saves all the time is killed: its latest checkpoint is whole."""
    run = cases.Run(1, "", "routed")
    for number in range(3):
        folder = tmp_path / str(number)
        process = mp.get_context("forkserver").Process(
            target=cases.save_for_ever, args=(str(folder),)
        )
        process.start()
        while sf.latest_checkpoint(folder) is None:
            time.sleep(0.01)
        time.sleep(0.061 * number)
        process.kill()
        process.join()
        path = sf.latest_checkpoint(folder)
        assert path is not None
        for kept in sorted(folder.glob("step_*"))[-3:]:  # whatever has its name is whole
            loaded = sf.load_checkpoint(kept, run.tx, run.params())
            steps = loaded.extra["step"]
            assert sf.checkpoint_path(folder, steps) == kept
        wanted = run.train(*run.start(), range(steps))
        loaded = sf.load_checkpoint(kept, run.tx, run.params())
        assert cases.same((loaded.params, loaded.state), wanted)


# Many ranks -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("world", "storage", "others"),
    [
        (4, "shard0", [(4, "shard0"), (2, "plain"), (3, "shard0"), (1, "")]),
        (4, "plain", [(4, "plain"), (4, "shard0"), (3, "plain")]),
        (3, "shard0", [(4, "strided"), (3, "shard1")]),
        (4, "strided", [(2, "shard0"), (1, "")]),
        (4, "left_to_right", [(3, "plain")]),
        (1, "", [(2, "shard0"), (1, "")]),
    ],
)
def test_resumed_on_other_ranks(
    tmp_path: Path, world: int, storage: str, others: list[tuple[int, str]]
) -> None:
    """The bits of an unbroken run on the same ranks, and everywhere if none rounds."""
    path = str(tmp_path / "a")
    packed = storage == "plain"
    on(world, cases.train_and_save, storage, path, 2, packed)
    extra = {"step": 2, "plan": {"lr": [0.1, 0.2]}} | {f"rank/{own}": own for own in range(world)}
    for number, stored in others:
        for routed, grafted in on(number, cases.resume, stored, path, 5):
            assert routed == (True, 0.0, extra)
            bits, error, found = grafted
            assert error < 1e-9
            assert found == extra
            assert bits or (number, stored) != (world, storage)


def on(world: int, act: Callable[..., Any], *args: object) -> list[Any]:
    """Do something on so many ranks, on one in this process."""
    return [act(0, 1, *args)] if world == 1 else workers.pool(world).run(act, *args)


def test_blocks_of_groups(tmp_path: Path) -> None:
    """Every block is on one rank of each group, and saved once."""
    assert all(workers.pool(4).run(cases.groups, str(tmp_path / "a")))


def test_one_of_two_ranks_for_itself(tmp_path: Path) -> None:
    """`alone` asks no other rank."""
    answers = workers.pool(2).run(cases.save_alone, str(tmp_path / "a"))
    assert all(answers)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("disk 0", "cannot|could not write the checkpoint"),
        ("disk 1", "cannot|rank 1 could not write the checkpoint"),
        ("extra", "neither a tensor nor plain data"),
        ("async", "neither a tensor nor plain data"),
        ("path", "different folders"),
    ],
)
def test_a_rank_that_fails_is_an_error_on_all(tmp_path: Path, how: str, message: str) -> None:
    """Typed, on every rank, at once; nothing is left, and the next save works."""
    for told, works in workers.pool(2).run(cases.fail, str(tmp_path), how):
        assert told.startswith("CheckpointError")
        assert any(part in told for part in message.split("|"))
        assert works
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


@pytest.mark.parametrize(("how", "message"), [("path", "no folder"), ("params", "'params/gain'")])
def test_a_rank_that_cannot_load_is_an_error_on_all(tmp_path: Path, how: str, message: str) -> None:
    """None goes on alone, to wait for the others."""
    path = str(tmp_path / "a")
    workers.pool(2).run(cases.train_and_save, "plain", path, 1)
    for told in workers.pool(2).run(cases.misfit, f"{path}/grafted", how):
        assert told.startswith("CheckpointError")
        assert message in told


@pytest.mark.parametrize("storage", ["plain", "shard0"])
def test_the_background_of_two_ranks(tmp_path: Path, storage: str) -> None:
    """The state is donated and collectives run while it is saved; the copy is what is saved."""
    assert all(workers.pool(2).run(cases.save_in_background, storage, str(tmp_path / "a")))


def test_files_of_every_rank_make_one(tmp_path: Path) -> None:
    """`torch.save` on each rank; the union of what a careful reader gets is the whole state."""
    workers.pool(4).run(cases.own_dict, "plain", str(tmp_path / "part"))
    union: dict[str, Tensor] = {}
    for path in sorted(tmp_path.glob("part.*")):
        assert inspect(["inspect", str(path)]) == 1  # a part of it
        union |= torch.load(path, weights_only=True)
    run = cases.Run(1, "")
    params, state = run.train(*run.start(), range(3))
    loaded = sf.from_state_dict(run.tx, params, through_a_file(union))
    for a, b in zip(sf.tree.leaves(loaded), sf.tree.leaves(state), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    torch.save(union, tmp_path / "whole.pt")
    assert inspect(["inspect", str(tmp_path / "whole.pt")]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 2])
def test_a_rank_that_is_killed_while_saving(tmp_path: Path, call: int) -> None:
    """The others get PeerError in time, and the checkpoint before loads."""
    pool = workers.Pool(2, patience=4.0)
    try:
        told, intact = pool.outcomes(cases.die_while_saving, str(tmp_path), call, seconds=20.0)[0]
        assert (told, intact) == ("PeerError", True)
        assert not sf.checkpoint_path(tmp_path, 4).exists()
    finally:
        pool.close()


@pytest.mark.slow
@pytest.mark.parametrize(("world", "storage", "at"), [(2, "shard0", 2), (4, "shard0", 1)])
def test_killed_in_a_step_and_resumed(tmp_path: Path, world: int, storage: str, at: int) -> None:
    """The last rank dies in the midst of a step; new ranks go on as if it had not."""
    pool = workers.Pool(world, patience=6.0)
    try:
        answers = pool.outcomes(cases.die_in_a_step, storage, str(tmp_path), at, seconds=40.0)
        assert answers[:-1] == [("PeerError", 5)] * (world - 1)
    finally:
        pool.close()
    path = sf.latest_checkpoint(tmp_path)
    assert path == sf.checkpoint_path(tmp_path, 4)
    for bits, error in workers.pool(world).run(cases.resume_at, storage, str(path), 8):
        assert bits
        assert error < 1e-9


# Other files, and the command line --------------------------------------------------------------


@pytest.mark.parametrize("packed", [False, True])
def test_safetensors(tmp_path: Path, packed: bool, capsys: pytest.CaptureFixture[str]) -> None:
    """The dict goes through safetensors as it is."""
    safetensors = pytest.importorskip("safetensors.torch")
    tx, params = small_shampoo(momentum=0.5), nested()
    state = trained(tx, params)
    file = tmp_path / "a.safetensors"
    safetensors.save_file(sf.to_state_dict(tx, state, params, pack_symmetric=packed), file)
    check_same(sf.from_state_dict(tx, params, safetensors.load_file(file)), state)
    assert inspect(["inspect", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "safetensors"
    os.truncate(file, file.stat().st_size - 1)
    assert inspect(["inspect", str(file)]) == 1
    assert "bytes, not" in capsys.readouterr().out


def test_inspect_counts_by_role_and_parameter(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The numbers of the folder, and of a file of torch.save, are those of the state."""
    tx, state, params = made(tmp_path / "a", extra={"step": 1})
    torch.save(sf.to_state_dict(tx, state, params), tmp_path / "a.pt")
    leaves = sf.to_state_dict(tx, state, params)
    del leaves["metadata"]
    for path, kind in ((tmp_path / "a", "folder"), (tmp_path / "a.pt", "torch.save")):
        assert inspect(["inspect", str(path), "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert (found["kind"], found["valid"], found["packed"]) == (kind, True, False)
        assert found["blocks"]["precondition"]["block_size"] == 3
        total = {
            "tensors": len(leaves),
            "bytes": sum(leaf.numel() * leaf.element_size() for leaf in leaves.values()),
        }
        assert found["total"] == total
        for rows in (found["roles"], found["parameters"]):
            assert {key: sum(row[key] for row in rows) for key in total} == total
        roles = {row["role"]: row for row in found["roles"]}
        factors = [leaf for key, leaf in leaves.items() if "/factors/" in key]
        assert roles["factor"]["tensors"] == roles["root"]["tensors"] == len(factors)
        assert roles["factor"]["bytes"] == sum(f.numel() * f.element_size() for f in factors)
        assert {"trace", "ema", "second_moment"} & set(roles) >= {"trace"}
        assert {row["parameter"] for row in found["parameters"]} == set(sf.tree.paths(params))
        others = {row["prefix"]: row["tensors"] for row in found["others"]}
        assert others == ({"extra": 1, "params": 6} if kind == "folder" else {})


def test_inspect_for_readers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Text: the largest parameters, or all; and why something is no checkpoint."""
    tx = sf.trace(0.9)
    params = {f"p{index}": torch.ones(index + 1) for index in range(12)}
    sf.save_checkpoint(tmp_path / "a", tx, tx.init(params), params)
    assert inspect(["inspect", str(tmp_path / "a")]) == 0
    text = capsys.readouterr().out
    assert "complete" in text and "and 2 more (--all)" in text
    assert "p11" in text and "p0 " not in text
    inspect(["inspect", str(tmp_path / "a"), "--all"])
    assert "p0 " in capsys.readouterr().out
    (tmp_path / "a" / "complete.json").unlink()
    assert inspect(["inspect", str(tmp_path / "a")]) == 1
    assert "NOT VALID" in capsys.readouterr().out
    (tmp_path / "note.txt").write_text("no checkpoint")
    torch.save([1], tmp_path / "list.pt")
    torch.save({"w": torch.ones(1)}, tmp_path / "weights.pt")
    for name, why in (("note.txt", "neither"), ("list.pt", "a list"), ("weights.pt", "'metadata'")):
        assert inspect(["inspect", str(tmp_path / name)]) == 1
        assert why in capsys.readouterr().out
    with pytest.raises(SystemExit) as error:
        inspect(["inspect", str(tmp_path / "nothing")])
    assert error.value.code == 2


@pytest.mark.slow
def test_the_command_needs_no_group(tmp_path: Path) -> None:
    """As it is typed, on a folder of two ranks."""
    path = str(tmp_path / "a")
    workers.pool(2).run(cases.train_and_save, "shard0", path, 2)
    done = subprocess.run(
        [sys.executable, "-m", "shampoo_func.checkpoint", "inspect", f"{path}/grafted"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(sf.__file__).parent.parent,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "chain: factor" in done.stdout
