"""Check a judge of prefopt.mtbench and prefopt.arena against published judgments, before its figures are believed.

    python -m prefopt.judge_check judge=gpt41 ratings=FILE.jsonl verdicts=FILE.jsonl
    python -m prefopt.judge_check judge=local judge.base_url=http://localhost:8000/v1 judge.model=NAME ratings=FILE

The judge is asked what the published one was asked, word for word. `ratings` is a file of FastChat's model_judgment,
`verdicts` one of Arena-Hard's, both with the prompts. The result is how often and how far the two differ, how often the
judge contradicts itself when the sides are exchanged, and what it leaves without a verdict. It is kept in the user's
cache by the judge's name and address, and every record that the judge makes from then on holds it.
"""

from omegaconf import DictConfig

from prefopt.cli.program import program
from prefopt.config.parse import parse
from prefopt.evaluation.config import JudgeCheckConfig
from prefopt.evaluation.judge_check import check


@program("judge_check", JudgeCheckConfig)
def main(cfg: DictConfig) -> None:
    check(parse(cfg, JudgeCheckConfig))


if __name__ == "__main__":
    main()
