#!/usr/bin/env bash
# MADPO's experiment in miniature: a reward model for each data quality, its scores, then each method with three learning
# rates at one seed of the high quality, and with the best one at three other seeds of all qualities.
. "$(dirname "$0")/../common.sh"
methods=madpo,beta_dpo,dpo,ipo
runs=runs/mini/madpo
results=results/mini/madpo

score_sentiment $runs
sweep train +sweep=mini/madpo "runs_dir=$runs/tuning" dataset.format.quality=high seed=100 optimizer.lr=2e-5,5e-5,1e-4 \
    "objective=$methods"
train_best $methods $runs/tuning +sweep=mini/madpo
[[ -n $dry ]] && exit
prefopt report runs_dir=$runs/tuning output=$results/tuning
prefopt report runs_dir=$runs/final output=$results columns=dataset.format.quality \
    published=results/published/madpo_table_1.csv
prefopt papers paper=madpo runs_dir=$runs/final output=$results
