"""The curves of a run: what is in them, and when they are drawn."""

import json
import os
from pathlib import Path

from prefopt.reporting import run_curves
from prefopt.reporting.run_curves import (
    CURVES,
    MOST_POINTS,
    PANELS,
    curves_figure,
    draw_run_curves,
    rows_of,
    thinned,
    write_curves,
)
from prefopt.reporting.style import PAGE, method_color, plotting
from tests.helpers.forks import At, run
from tests.helpers.tiny import records

PAIR = {"accuracy": 0.5, "margin": 0.1, "rejected_logps": -20.0}


def steps(n: int, **metrics: float) -> list[dict]:
    """Rows of `n` training steps, and of evaluations before the first and after the last."""
    both = {"loss": 0.7, "chosen_logps": -10.0, **metrics}
    train = [{"step": i, "split": "train", **both, "gradient_norm": float(i), "lr": 1e-5} for i in range(1, n + 1)]
    samples = {"kl": 1.0, "kl_se": 0.5} if metrics else {}
    first, last = ({"step": step, "split": "heldout", **both, **samples} for step in (0, n))
    return [first, *train, last]


def a_run(folder: Path, rows: list[dict], objective: str = "dpo") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    config = {"model": {"name": "m"}, "dataset": {"name": "d"}, "objective": {"beta": 0.1}, "logger": {"curves": True}}
    record = {"name": folder.name, "objective": objective, "status": "finished", "config": config}
    (folder / "record.json").write_text(json.dumps(record))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_there_is_a_panel_for_each_metric_of_the_run_with_its_values(tmp_path):
    rows = rows_of([a_run(tmp_path / "dpo", steps(3, **PAIR)) / "metrics.jsonl"])
    with plotting() as plt:
        figure = curves_figure(plt, rows, "title", "dpo")
        figure.draw_without_rendering()
        panels = {axis.get_title(): axis for axis in figure.axes if axis.get_title()}
        assert list(panels) == [title for key, title in PANELS.items() if key != "oracle_reward"]
        train, heldout = panels["loss"].lines
        assert [list(train.get_xdata()), list(heldout.get_xdata())] == [[1, 2, 3], [0, 3]]
        assert list(panels["gradient norm"].lines[0].get_ydata()) == [1, 2, 3]
        (bars,) = panels[PANELS["kl"]].collections
        assert [segment[:, 1].tolist() for segment in bars.get_segments()] == [[0.5, 1.5]] * 2
        # Told apart by color, and without it by the markers of the few evaluations.
        assert heldout.get_color() == method_color("dpo") != train.get_color()
        assert (train.get_marker(), heldout.get_marker()) == ("", "s")
        assert [text.get_text() for text in figure.legends[0].get_texts()] == [
            "training step",
            "held-out, ± 1 standard error",
        ]
        assert figure.get_figwidth() == PAGE
        texts = [text for text in figure.findobj(plt.Text) if text.get_text() and text.get_visible()]
        assert min(text.get_fontsize() for text in texts) >= 7
        plt.close(figure)

        sft = curves_figure(plt, rows_of([a_run(tmp_path / "sft", steps(3), "sft") / "metrics.jsonl"]), "", "sft")
        titles = [axis.get_title() for axis in sft.axes if axis.get_title()]
        assert titles == [PANELS[key] for key in ("loss", "chosen_logps", "gradient_norm", "lr")]
        plt.close(sft)


def test_a_single_metric_is_a_single_panel_and_none_is_no_figure():
    rows = [{"step": 0, "split": "heldout", "stage": 0, "accuracy": None, "loss": 0.7}]
    with plotting() as plt:
        figure = curves_figure(plt, rows, "", "dpo")
        assert [axis.get_title() for axis in figure.axes] == ["loss"]
        plt.close(figure)
        assert curves_figure(plt, [rows[0] | {"loss": None}], "", "dpo") is None


def test_many_steps_are_averaged_in_equal_stretches_and_the_legend_says_so():
    line = [(float(i), float(i), 0.0) for i in range(1, 3 * MOST_POINTS + 1)]
    averaged, stretch = thinned(line)
    assert stretch == 3
    assert averaged == [(3.0 * i + 2, 3.0 * i + 2, 0.0) for i in range(MOST_POINTS)]
    assert thinned(line[:MOST_POINTS]) == (line[:MOST_POINTS], 1)
    rows = [row | {"stage": 0} for row in steps(3 * MOST_POINTS)]
    with plotting() as plt:
        figure = curves_figure(plt, rows, "", "dpo")
        assert figure.legends[0].get_texts()[0].get_text() == "training, mean of 3 steps"
        plt.close(figure)


def test_a_step_that_is_not_finite_is_left_out():
    rows = [row | {"stage": 0} for row in steps(3)]
    rows[2]["loss"] = float("nan")
    assert [x for x, *_ in run_curves.curve(rows, "train", "loss")] == [1, 3]


def test_the_stages_of_an_online_run_follow_each_other(tmp_path):
    folder = a_run(tmp_path / "online", [], "online-dpo")
    (folder / "metrics.jsonl").unlink()
    for n in (1, 2, 10):  # by their numbers, not their names
        a_run(folder / f"stage_{n}" / f"r{n}", [row | {"loss": n} for row in steps(2, **PAIR)])
    rows = rows_of(run_curves.metrics_files(folder))
    heldout = [(row["step"], row["loss"]) for row in rows if row["split"] == "heldout"]
    assert heldout == [(0, 1), (2, 1), (4, 2), (6, 10)]
    assert [row["step"] for row in rows if row["split"] == "train"] == [1, 2, 3, 4, 5, 6]
    with plotting() as plt:
        figure = curves_figure(plt, rows, "", "online-dpo")
        borders = [line.get_xdata()[0] for line in figure.axes[0].lines if line.get_linestyle() == ":"]
        assert borders == [2, 4]
        plt.close(figure)
    write_curves(folder)
    assert len(list(folder.rglob(CURVES))) == 4


def test_curves_are_drawn_once_and_again_for_newer_metrics(tmp_path):
    folder = a_run(tmp_path / "dpo", steps(2))
    write_curves(folder)
    first = (folder / CURVES).stat()
    assert (folder / CURVES).read_bytes().startswith(b"\x89PNG")
    write_curves(folder)
    assert (folder / CURVES).stat().st_mtime_ns == first.st_mtime_ns
    later = first.st_mtime + 10
    os.utime(folder / "metrics.jsonl", (later, later))
    write_curves(folder)
    assert (folder / CURVES).stat().st_ino != first.st_ino


def test_curves_that_cannot_be_drawn_are_a_warning(tmp_path, capsys):
    folder = a_run(tmp_path / "dpo", steps(2))
    (folder / "record.json").write_text("{")
    write_curves(folder)
    assert f"{folder / CURVES} was not drawn: " in capsys.readouterr().err
    write_curves(tmp_path)  # a job that trains nothing
    assert not list(tmp_path.rglob(CURVES))


def test_a_report_has_the_curves_of_the_runs_whose_metrics_are_there(tmp_path):
    runs = [a_run(tmp_path / name, steps(2)) for name in ("a", "b")]
    found = [json.loads((run / "record.json").read_text()) | {"folder": str(run)} for run in runs]
    (runs[1] / "metrics.jsonl").unlink()
    archived = {key: value for key, value in found[0].items() if key != "folder"}
    assert draw_run_curves([*found, archived], tmp_path / "out") == [tmp_path / "out" / "curves"]
    assert [file.name for file in (tmp_path / "out" / "curves").iterdir()] == ["a.png"]
    assert draw_run_curves([archived], tmp_path / "other") == []
    assert not (tmp_path / "other").exists()


def test_a_run_that_was_killed_before_its_curves_gets_them_with_the_same_command(overrides, tmp_path):
    args = [*overrides(tmp_path / "runs"), "steps=2", "logger.curves=true"]
    code, _ = run(tmp_path / "log", *args, curves=True, at=At("prefopt.train:write_curves"))
    (record,) = records(tmp_path / "runs")
    folder = tmp_path / "runs" / record["name"]
    assert (code, record["status"]) == (-9, "finished")
    assert not (folder / CURVES).exists()
    code, said = run(tmp_path / "log", *args, curves=True)
    assert code == 0, said
    assert "finished, skipped" in said
    assert f"its curves: {folder / CURVES}" in said
    assert (folder / CURVES).exists()


def test_a_logger_that_wants_no_curves_gets_none(tmp_path):
    folder = a_run(tmp_path / "dpo", steps(2, **PAIR))
    record = json.loads((folder / "record.json").read_text())
    record["config"]["logger"]["curves"] = False
    (folder / "record.json").write_text(json.dumps(record))
    write_curves(folder)
    assert not (folder / CURVES).exists()
    assert draw_run_curves([record | {"folder": str(folder)}], tmp_path / "report") == []
