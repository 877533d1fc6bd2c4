"""Several processes: the result of one, equal bits in each, output from the first, and a common end."""

from __future__ import annotations

import json
import math
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import metareg
from metareg import MetaregError, UsageError
from metareg.learner.batch_split import select_tasks
from metareg.learner.processes import Processes, join_processes
from metareg.util.signals import StopRequest
from metareg.util.torchrun import read_rank
from processes import environment
from ranks import COMMAND, FITTED, LEARNERS, fitted, learner_of, run_of, trained
from reference import NETS, meta_gradient
from samples import episodes

RANKS = str(Path(__file__).parents[1] / "helpers" / "ranks.py")
RESULT = ("metrics.jsonl", "results.json", "checkpoints/final.safetensors")


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> SimpleNamespace:
    """Run `ranks.main` in two processes; return the folder, and each process's results."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    here = environment() | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        subprocess.Popen(
            [sys.executable, RANKS, str(folder)],
            env=here | {"RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in "01"
    ]
    output = [process.communicate(timeout=240)[0] for process in started]
    assert [process.returncode for process in started] == [0, 9], "\n".join(output)
    return SimpleNamespace(
        folder=folder, output=output, ranks=[torch.load(folder / f"rank-{rank}.pt") for rank in "01"]
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run of one process."""
    path = tmp_path_factory.mktemp("alone") / "run"
    run_of(path)
    return path


def _close(one: Any, other: Any) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11, check_dtype=False)


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]


def _same_to_rounding(one: Path, other: Path) -> None:
    for line, expected in zip(_lines(one), _lines(other), strict=True):
        assert line.keys() == expected.keys()
        assert line.pop("split") == expected.pop("split")
        assert line == pytest.approx(expected, rel=1e-8)
    scores, expected = (json.loads((path / "results.json").read_text())["steps"] for path in (one, other))
    for step, wanted in zip(scores, expected, strict=True):
        assert step["scores"] == pytest.approx(wanted["scores"], rel=1e-8)


# ------------------------------------------------------------------------------------------------------------- learners


@pytest.mark.parametrize("case", LEARNERS)
def test_two_processes_learn_what_one_learns(together: SimpleNamespace, case: str) -> None:
    expected = trained(case, Processes())
    for found in together.ranks:
        got = found["learners"][case]
        _close(got["meta"], expected["meta"])
        _close(got["scores"], expected["scores"])
        for logs, wanted in zip(got["logs"], expected["logs"], strict=True):
            assert list(logs) == list(wanted)
            assert logs == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("case", FITTED)
def test_each_process_draws_its_share_alone(together: SimpleNamespace, case: str) -> None:
    """After the first block, which checks the strategies, the result is that of one process."""
    expected = fitted(case, Processes())
    first, second = (found["fitted"][case] for found in together.ranks)
    assert first["digest"] == second["digest"]
    _close(first["meta"], expected["meta"])
    assert expected["asked"] == [list(range(5)), *(list(range(start, start + 10)) for start in (0, 10, 20))]
    assert first["asked"][:2] == second["asked"][:2] == expected["asked"][:2]
    assert [each["tested"] for each in (expected, first, second)] == [[[0, 1, 2, 3, 4]], [[0, 1]], [[2, 3, 4]]]
    for one, other, every in zip(first["asked"][2:], second["asked"][2:], expected["asked"][2:], strict=True):
        if FITTED[case]:
            assert [len(one), len(other)] == [4, 6]
            assert sorted(one + other) == every
        else:
            assert one == other == every


def test_two_processes_learn_from_images_as_a_plain_loop_does(together: SimpleNamespace) -> None:
    """Take three steps of `torch.optim.Adam` on reference gradients, whatever their memory layout."""
    learner = learner_of("images")
    batch = LEARNERS["images"][2]()
    learner.meta_gradient(batch)
    meta = {name: value.clone().requires_grad_() for name, value in learner.meta_parameters.items()}
    adam = torch.optim.Adam(list(meta.values()))
    for _ in range(3):
        _, grads = meta_gradient(
            NETS["conv"],
            meta,
            list(zip(*batch.parts, strict=True)),
            algo="metasgd",
            inner_lr=0.01,
            inner_steps=1,
            gamma=1.0,
        )
        for name, value in meta.items():
            value.grad = grads[name].clone(memory_format=torch.contiguous_format)
        adam.step()
    for found in together.ranks:
        for name, value in found["learners"]["images"]["meta"].items():
            torch.testing.assert_close(value, meta[name].detach(), rtol=0, atol=1e-7, msg=name)


@pytest.mark.parametrize("case", LEARNERS)
def test_processes_hold_the_same_bits(together: SimpleNamespace, case: str) -> None:
    first, second = (found["learners"][case] for found in together.ranks)
    assert first["digest"] == second["digest"]
    assert first["logs"] == second["logs"]
    assert torch.equal(first["scores"], second["scores"])


def test_processes_that_drift_apart_are_noticed(together: SimpleNamespace) -> None:
    for found in together.ranks:
        assert "processes have different meta-parameters" in found["drifted"]


def test_a_group_of_the_program_is_used_and_left(together: SimpleNamespace) -> None:
    for found in together.ranks:
        assert found["again"] == found["still"] == [0, 1]


@pytest.mark.parametrize(("count", "size"), [(5, 2), (2, 2), (7, 3), (100, 7), (2, 5)])
def test_shares_are_all_and_equal(count: int, size: int) -> None:
    shares = [Processes(rank, size).share(count) for rank in range(size)]
    assert [number for share in shares for number in share] == list(range(count))
    assert {len(share) for share in shares} <= {math.floor(count / size), math.ceil(count / size)}
    assert max(len(share) for share in shares) == Processes(0, size).largest_share(count)


def test_tasks_are_numbered_through_the_stacks() -> None:
    batch = episodes("mlp", 7)
    stacks = [batch[:1], batch[1:4], batch[4:]]
    chosen = select_tasks(stacks, range(2, 6))
    assert [len(stack) for stack in chosen] == [2, 2]
    assert torch.equal(torch.cat([stack.support_x for stack in chosen]), batch[2:6].support_x)
    assert select_tasks(stacks, range(3, 3)) == []


# ----------------------------------------------------------------------------------------------------------------- runs


def test_a_run_of_two_processes_is_that_of_one(together: SimpleNamespace, alone: Path) -> None:
    _same_to_rounding(together.folder / "run", alone)
    first, second = (found["run"]["scores"] for found in together.ranks)
    assert torch.equal(first, second)


def test_only_the_first_process_speaks(together: SimpleNamespace) -> None:
    first, second = (found["run"] for found in together.ranks)
    assert first["heard"] == ["start", "step 3", "step 6", "step 9", "step 12", "step 14", "end"]
    assert first["lines"] > 0
    assert second["heard"] == []
    assert second["lines"] == 0
    said, silent = together.output
    assert silent == ""
    assert said.count("\n") == said.count("co-learner") == 1  # one of the learners combines ANIL and CML


@pytest.mark.parametrize("policy", ["skip", "rollback"])
def test_all_skip_and_roll_back_where_one_diverges(together: SimpleNamespace, tmp_path: Path, policy: str) -> None:
    run_of(tmp_path / "run", {"infinite": [24, 47]}, on_nonfinite=policy)
    _same_to_rounding(together.folder / policy, tmp_path / "run")


def test_a_signal_to_one_stops_all_after_the_same_step(together: SimpleNamespace) -> None:
    advice = f"`metareg resume '?{re.escape(str(together.folder / 'stopped'))}'?` continues from step 7."
    for found in together.ranks:
        kind, text = found["stopped"]
        assert kind == "Interrupted"
        assert re.fullmatch(f"Stopped. {advice}", text)


def test_a_stopped_run_ends_as_one_left_alone(together: SimpleNamespace) -> None:
    for name in RESULT:
        assert (together.folder / "stopped" / name).read_bytes() == (together.folder / "run" / name).read_bytes()


def test_one_process_goes_on_with_a_run_of_two(
    together: SimpleNamespace, alone: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = together.folder / "stopped, for one process"
    assert not (path / "results.json").exists()
    run_of(path, {"signal": 5 * 6 + 1}, resume=True)
    assert "processes was 2" in caplog.text
    _same_to_rounding(path, alone)


@pytest.mark.parametrize("when", ["failure at first", "failure"])
def test_an_error_in_one_is_raised_in_all(together: SimpleNamespace, when: str) -> None:
    first, second = (found[when] for found in together.ranks)
    assert first == ("UsageError", "Process 1 of 2: The disk of this machine is gone.")
    assert second == ("UsageError", "The disk of this machine is gone.")


def test_an_error_of_an_observer_is_raised_in_all(together: SimpleNamespace) -> None:
    assert [found["observer"] for found in together.ranks] == [("UsageError", "The logbook is full.")] * 2


def test_a_process_that_ends_does_not_leave_the_others_waiting(together: SimpleNamespace) -> None:
    kind, text = together.ranks[0]["lost"]
    assert kind == "LostProcessError"
    assert text.startswith("Another process of this training ended early. `metareg resume ")
    assert text.endswith("continues from step 8.")


# -------------------------------------------------------------------------------------------------------------- command


@pytest.mark.parametrize(
    ("case", "code", "words"),
    [
        ("name", 2, "There is no algorithm named 'mamal'; did you mean 'maml'"),
        ("option", 2, "Invalid value for '--steps'"),
        ("batch", 2, "2 processes cannot share a batch of 1"),
        ("taken", 2, "already exists and is not empty"),
        ("missing", 2, "There is no run at"),
        ("command", 2, "run `metareg eval` in one process"),
        ("trained", 0, "Test over 2 tasks"),
        ("ended", 0, "has already finished"),
    ],
)
def test_what_the_command_says(together: SimpleNamespace, case: str, code: int, words: str) -> None:
    first, second = (found["spoken"][case] for found in together.ranks)
    assert first[0] == second[0] == code
    assert first[1].count(words) == 1
    assert second[1] == ""
    assert not (together.folder / "none").exists()


def test_the_environment_says_who_worked_together(together: SimpleNamespace, alone: Path) -> None:
    found = json.loads((together.folder / "command" / "environment.json").read_text())
    assert (found["processes"], found["backend"]) == (2, "gloo")
    found = json.loads((alone / "environment.json").read_text())
    assert (found["processes"], found["backend"]) == (1, None)


def test_torchrun_passes_a_signal_on(tmp_path: Path) -> None:
    path, codes = tmp_path / "run", tmp_path / "codes"
    codes.mkdir()
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", RANKS, "--codes", str(codes)]
    command = [*map(str, COMMAND), "--steps", "100000", "--out", str(path)]
    with subprocess.Popen(
        [sys.executable, *launcher, *command], stderr=subprocess.PIPE, text=True, env=environment()
    ) as process:
        assert process.stderr is not None
        while not (path / "checkpoints" / "step-000000000.safetensors").is_file():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.02)
        time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        text = process.stderr.read()
    assert sorted((file.name, file.read_text()) for file in codes.iterdir()) == [("0", "130"), ("1", "130")]
    (step,) = re.findall(r"Stopped. `metareg resume .*` continues from step (\d+)\.", text)
    assert int(step) > 0
    assert (path / "checkpoints" / f"step-{int(step):09d}.safetensors").is_file()
    assert text.count("stopping after this step") == 1


# ------------------------------------------------------------------------------------------------------------ launching


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_one_process_where_nothing_launched_several(launched: pytest.MonkeyPatch) -> None:
    launched.setenv("WORLD_SIZE", "8")  # some schedulers set it
    assert read_rank().size == 1
    with join_processes() as processes:
        assert processes.size == 1
        assert processes.first(lambda: 1) == processes.each(lambda: 1) == 1
        assert processes.gather(lambda: 1) == [1]


@pytest.mark.parametrize(("rank", "size"), [("2", "2"), ("-1", "2"), ("one", "2"), ("0", "0")])
def test_an_impossible_place_is_refused(launched: pytest.MonkeyPatch, rank: str, size: str) -> None:
    launched.setenv("RANK", rank)
    launched.setenv("WORLD_SIZE", size)
    with pytest.raises(UsageError, match=f"RANK='{rank}', WORLD_SIZE='{size}'"):
        metareg.train(steps=1)


def test_processes_without_an_address_are_refused(launched: pytest.MonkeyPatch) -> None:
    launched.setenv("RANK", "0")
    launched.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match=r"cannot find each other: .*MASTER_ADDR"):
        metareg.train(steps=1)


def test_processes_that_do_not_come_are_not_waited_for_without_end(launched: pytest.MonkeyPatch) -> None:
    from datetime import timedelta

    launched.setattr("metareg.learner.processes.TIMEOUT", timedelta(seconds=0.2))
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "9"}.items():
        launched.setenv(name, value)
    with pytest.raises(MetaregError, match="The 2 processes did not find each other"):
        metareg.train(steps=1)


def test_each_process_has_a_gpu_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    chosen: list[int] = []
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", chosen.append)
    assert Processes(5, 8, 1).device("auto") == torch.device("cuda:1")
    assert chosen == [1]
    with pytest.raises(UsageError, match=r"process 2.*--device cpu"):
        Processes(2, 4, 2).device("auto")
    assert Processes(0, 1, 0).device("auto") == torch.device("cuda")
    assert Processes(1, 2, 1).device("cpu") == torch.device("cpu")
    monkeypatch.setattr("metareg.learner.processes.find_device", torch.device)
    with pytest.raises(UsageError, match="cannot share the GPU 'cuda:0'"):
        Processes(1, 2, 1).device("cuda:0")


def test_a_signal_that_the_launcher_repeats_is_one() -> None:
    stop = StopRequest(launched=True)
    for _ in range(3):
        stop.handle(signal.SIGINT, None)
    assert stop.asked
    single = StopRequest()
    single.handle(signal.SIGINT, None)
    with pytest.raises(KeyboardInterrupt):
        single.handle(signal.SIGINT, None)


def test_a_second_signal_stops_launched_processes_now(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metareg.util.signals._ECHO_SECONDS", 0.01)
    stop = StopRequest(launched=True)
    stop.handle(signal.SIGINT, None)
    time.sleep(0.02)
    with pytest.raises(KeyboardInterrupt):
        stop.handle(signal.SIGINT, None)
