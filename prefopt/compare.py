"""Read what two runs answer: in which settings they differ, then the answers side by side, a few here and all of them
on an HTML page. Answers that were cut off, and equal ones, are marked.

    python -m prefopt.compare run=runs/A run=runs/B
    python -m prefopt.compare run=runs/A run=runs/B third=chosen
    python -m prefopt.compare run=runs/A run=runs/B instructions=questions.jsonl judge=gpt4o_mini

With a judge it is `prefopt.alpaca run=runs/A baseline=runs/B` with other defaults, and the page shows its preferences.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from prefopt.cli.program import program, refuse_launcher_without_multirun
from prefopt.config.parse import parse
from prefopt.errors import UserError
from prefopt.evaluation.alpaca import AlpacaResult, answers_of, answers_of_baseline, check_comparison
from prefopt.evaluation.answers import Answers, baseline_of
from prefopt.evaluation.cost import Budget
from prefopt.evaluation.judges import Judge
from prefopt.evaluation.questions import Questions, heldout_questions, read_questions
from prefopt.reporting.compare import Answer, Compared, format_answers, page, summarize
from prefopt.reporting.config import CompareConfig
from prefopt.reporting.differences import config_differences, print_table
from prefopt.reporting.tables import Tabular
from prefopt.tracking.policies import exported_policies
from prefopt.tracking.record import read_result, record_of
from prefopt.utils.console import console
from prefopt.utils.files import atomic_write
from prefopt.utils.fingerprint import fingerprint
from prefopt.utils.store import read_sealed_lines

IN_TERMINAL = 3  # prompts: the page has them all


@program("compare", CompareConfig)
def compare(cfg: DictConfig) -> None:
    refuse_launcher_without_multirun()
    config = parse(cfg, CompareConfig)
    if config.run is None or config.model_outputs is not None:
        raise UserError("two runs are compared: python -m prefopt.compare run=A run=B")
    if config.checkpoints != "final":
        raise UserError("a comparison is of the final policies: leave checkpoints out.")
    check_third(config)
    chosen: list[str] = []

    def read() -> Questions:
        if config.instructions is not None:
            questions = read_questions(config.instructions, config.split)
            return replace(questions, items=questions.items[: config.limit]) if config.limit else questions
        assert config.run is not None
        questions, completions = heldout_questions(record_of(config.run)["config"]["dataset"], config.limit)
        chosen.extend(completions)
        return questions

    judge, questions = check_comparison(config, read)
    print(f"A: {config.run}\nB: {config.baseline}")
    differences = None
    if (Path(config.baseline) / "record.json").is_file():
        differences = config_differences(record_of(config.run), record_of(config.baseline))
        print_table(differences)

    third = third_answers(config, questions, chosen)
    items, facts = compared(config, judge, questions, third)
    names = [config.run, config.baseline, *([third.name] if third else [])]
    facts = summarize(items, names) | facts
    output = write_page(config, names, facts, items, differences)
    console().print(format_answers(items, IN_TERMINAL))
    for name, value in facts.items():
        print(f"{name}: {value}")
    print(output)


def check_third(config: CompareConfig) -> None:
    """Raise UserError where there can be no such third column, or no questions."""
    if config.third not in (None, "initial", "chosen"):
        raise UserError(f"third must be initial, chosen or null, is {config.third!r}")
    if config.third == "chosen" and config.instructions is not None:
        raise UserError("third=chosen shows the data's chosen completions: leave instructions out")
    if config.limit is not None and config.limit < 1:
        raise UserError(f"limit must be at least 1, or null, is {config.limit}")
    if config.third == "initial":
        baseline_of("initial", config.run)


def third_answers(config: CompareConfig, questions: Questions, chosen: Sequence[str]) -> Answers | None:
    """The answers of the third column: the data's, or those of the model that A began from."""
    if config.third == "chosen":
        return Answers("the data's chosen completions", list(chosen), [True] * len(chosen), None)
    if config.third == "initial":
        return replace(
            answers_of_baseline(replace(config, baseline="initial"), questions), name="the model that A began from"
        )
    return None


def compared(
    config: CompareConfig, judge: Judge | None, questions: Questions, third: Answers | None
) -> tuple[list[Compared], dict[str, str]]:
    """The prompts with their answers, and facts for the page."""
    assert config.run is not None
    (checkpoint,) = exported_policies(config.run, "final")
    facts = {"sampling": ", ".join(f"{key} {value}" for key, value in vars(config.sampling).items())}
    if judge is None:
        a, b = answers_of(checkpoint, questions, config), answers_of_baseline(config, questions)
        rows: list[dict[str, Any]] = [
            {"instruction": question.instruction, "output_2": a.texts[i], "output_1": b.texts[i]}
            | {"finished_2": a.finished[i], "finished_1": b.finished[i]}
            for i, question in enumerate(questions.items)
        ]
    else:
        comparison = AlpacaResult(config, judge, checkpoint, questions, lambda: answers_of_baseline(config, questions))
        folder = comparison.make(Budget(config.max_cost), {})
        rows, _ = read_sealed_lines(folder / "annotations.json")
        rows.sort(key=lambda row: row["index"])
        record = read_result(folder / "record.json")
        facts["judge"] = record["judge"]["name"]
        facts["win rate of A"] = f"{record['figures']['win_rate']:.1f} ± {record['figures']['standard_error']:.1f} %"

    items = []
    for place, row in enumerate(rows):
        answers = [
            Answer(row[f"output_{k}"], row[f"finished_{k}"], row.get(f"reward_{k}")) for k in (2, 1)
        ]  # alpaca-eval calls the run's answer output_2
        if third:
            answers.append(Answer(third.texts[place], third.finished[place]))
        items.append(Compared(row["instruction"], answers, row.get("preference")))
    return items, facts


def write_page(
    config: CompareConfig,
    names: Sequence[str],
    facts: dict[str, str],
    items: Sequence[Compared],
    differences: Tabular | None,
) -> Path:
    """Write the page into compare/ in the folder of A, or into `output`. The same comparison has the same name."""
    key = fingerprint([names, facts, [item.prompt for item in items]])[:8]
    output = Path(config.output or Path(str(config.run)) / "compare") / f"{Path(config.baseline).name}-{key}.html"
    atomic_write(output, page(names, facts, items, differences))
    return output


def main() -> None:
    """The second run= on the command line is the baseline."""
    runs = [i for i, argument in enumerate(sys.argv) if argument.startswith("run=")]
    if len(runs) > 2:
        print(
            "error: two runs are compared, and run= is given more often: python -m prefopt.compare run=A run=B",
            file=sys.stderr,
        )
        sys.exit(2)
    if len(runs) == 2:
        sys.argv[runs[1]] = f"baseline={Path(sys.argv[runs[1]].removeprefix('run='))}"
    compare()


if __name__ == "__main__":
    main()
