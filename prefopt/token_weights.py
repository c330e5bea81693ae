"""Write weights for the tokens of pairs beside them, from two contrastive models, for objective=tis_dpo.

    python -m prefopt.token_weights input=pairs.jsonl output=out.jsonl positive=runs/A/policy negative=runs/B/policy

`positive` has been trained towards the chosen completions and `negative` towards the rejected ones, both from the
policy: by DPO, and by DPO with +dataset.columns.chosen=rejected +dataset.columns.rejected=chosen. A chosen token weighs
exp(scale * d), d = log pi+ - log pi- between `low` and `high`, and a rejected one exp(-scale * d). The rows get
`chosen_token_weights` and `rejected_token_weights`, as long as the completions in tokens with their terminators.
"""

from omegaconf import DictConfig

from prefopt.cli.program import program
from prefopt.config.parse import parse
from prefopt.rewards.config import TokenWeightsConfig
from prefopt.rewards.token_weights import write_token_weights


@program("token_weights", TokenWeightsConfig)
def main(cfg: DictConfig) -> None:
    write_token_weights(parse(cfg, TokenWeightsConfig))


if __name__ == "__main__":
    main()
