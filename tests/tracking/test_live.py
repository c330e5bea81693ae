"""What `prefopt runs watch=true` shows of runs at work."""

import json
import os
from pathlib import Path

import pytest
from rich.console import Console

import prefopt.runs
from prefopt.tracking.live import SPEED_OVER, Watch, progress_of
from prefopt.tracking.process import process_info
from prefopt.tracking.status import RunsConfig, RunStatus, select


def train(step: int, loss: float = 0.6, speed: float = 4.0) -> dict:
    return {"step": step, "split": "train", "loss": loss, "pairs_per_second": speed}


def heldout(step: int, loss: float = 0.7) -> dict:
    return {"step": step, "split": "heldout", "loss": loss}


def write(folder: Path, *rows: dict) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return folder


def a_run(folder: Path, *rows: dict, state: str = "running", **config) -> RunStatus:
    record = {**process_info(), "slurm_job": None, "status": state, "config": {"steps": 20, "batch_size": 8} | config}
    write(folder, *rows)
    (folder / "record.json").write_text(json.dumps(record))
    return RunStatus(folder, record, state, None)


def test_how_far_a_run_is_comes_from_the_end_of_its_metrics(tmp_path):
    run = a_run(tmp_path / "a", heldout(0), *(train(i, speed=1.0) for i in range(1, 6)), heldout(5, 0.65))
    write(run.folder, *(train(i, 0.5, speed) for i, speed in enumerate([2.0] * 5 + [6.0] * 5, start=6)))
    with (run.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "spl')  # the line that is being written
    found = progress_of(run)
    assert (found.step, found.steps, found.train_loss, found.heldout_loss) == (15, 20, 0.5, 0.65)
    assert SPEED_OVER == 10
    assert found.pairs_per_second == pytest.approx(3.0)  # as many pairs at 2 as at 6 a second
    new = progress_of(a_run(tmp_path / "new", steps=None))
    assert (new.step, new.steps, new.train_loss, new.pairs_per_second) == (None, None, None, None)


def test_an_online_run_is_as_far_as_its_stages(tmp_path):
    run = a_run(tmp_path / "online", stages=3)
    (run.folder / "metrics.jsonl").unlink()
    write(run.folder / "stage_1" / "r", heldout(0), train(20))
    write(run.folder / "stage_2" / "r", heldout(0), train(1, 0.4))
    found = progress_of(run)
    assert (found.step, found.steps, found.train_loss) == (21, 60, 0.4)


def test_the_time_left_is_that_of_the_steps_and_then_as_measured(tmp_path):
    run = a_run(tmp_path / "a", heldout(0), train(1))
    watch = Watch()
    watch.look([run])
    assert watch.progress[run.folder].seconds_left == pytest.approx(19 * 8 / 4.0)
    now = (run.folder / "metrics.jsonl").stat().st_mtime
    write(run.folder, train(2), train(3), heldout(3))
    os.utime(run.folder / "metrics.jsonl", (now + 30, now + 30))  # with an evaluation: 15 s a step
    watch.look([run])
    assert watch.progress[run.folder].seconds_left == pytest.approx(17 * 15)
    watch.look([RunStatus(run.folder, run.record, "interrupted", None)])
    assert watch.progress[run.folder].seconds_left is None


def test_the_table_fits_80_columns_and_the_terminal_and_shows_what_is_at_work_first(tmp_path):
    for i in range(30):
        state = {0: "interrupted", 1: "running", 2: "queued"}.get(i, "finished")
        a_run(tmp_path / f"mmpo-smollm2-135m-sentiment-{i:08d}", heldout(0), train(4999), state=state, steps=5000)
    watch = Watch()
    watch.look(select(RunsConfig(str(tmp_path), "*")))
    with (console := Console(width=80)).capture() as printed:
        console.print(watch.table(24))
    lines = printed.get().splitlines()
    assert len(lines) <= 24
    assert max(map(len, lines)) <= 80
    assert lines[0].rstrip() == "27 finished, 1 interrupted, 1 running, 1 queued"
    assert lines[1].rstrip() == "run: … is mmpo-smollm2-135m-sentiment"
    cells = [line.split() for line in lines if line.strip().startswith("…-")]
    assert cells[0] == ["…-00000001", "running", "4999/5000", "0.6000", "0.7000", "4", "2", "s"]
    assert cells[1][:2] == ["…-00000002", "queued"]
    assert lines[-1].startswith("and ")


def test_a_line_is_printed_for_each_run_that_has_changed(tmp_path):
    runs = [a_run(tmp_path / "a", heldout(0)), a_run(tmp_path / "b", heldout(0))]
    watch = Watch()
    watch.look(runs)
    assert watch.changes() == [f"{name}: running, step 0/20, held-out 0.7000" for name in ("a", "b")]
    write(runs[1].folder, train(1))
    watch.look(runs)
    (line,) = watch.changes()
    assert line.startswith("b: running, step 1/20, loss 0.6000, held-out 0.7000, pairs/s 4, left ")
    watch.look([RunStatus(runs[0].folder, runs[0].record, "died", None)])
    assert watch.changes() == ["a: died, step 0/20, held-out 0.7000"]


def test_ctrl_c_ends_watching_and_returns_what_was_seen(tmp_path, monkeypatch, capfd):
    run = a_run(tmp_path / "dpo-a", heldout(0), train(3))

    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(prefopt.runs.time, "sleep", interrupt)
    monkeypatch.setattr(prefopt.runs.os, "isatty", lambda _: False)
    assert [seen.folder for seen in prefopt.runs.watch(RunsConfig(str(tmp_path), "*"))] == [run.folder]
    said = capfd.readouterr().out
    assert said.startswith("dpo-a: running, step 3/20, loss 0.6000")
    assert "\x1b" not in said  # no control codes without a terminal
