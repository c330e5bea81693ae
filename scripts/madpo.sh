#!/usr/bin/env bash
# MADPO's experiment in miniature: a reward model for each data quality, its scores, then each method with three learning
# rates at one seed of the high quality, and with the best one at three other seeds of all qualities. Called again it
# skips what is finished. `make madpo` calls it; arguments go to every training sweep (launcher.at_once=2).
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
methods=madpo,beta_dpo,dpo,ipo
scored=runs/madpo/scored.jsonl.gz
sweep=(-m +sweep=madpo "$@")

$python -m prefopt.train -m +sweep=madpo_rewards "$@"
if [[ ! -f $scored ]]; then
    rows=package://prefopt/data/sentiment_offline.jsonl.gz
    for quality in high medium low; do
        model=(runs/madpo/rewards/reward-*-sentiment-$quality-*/policy)
        $python -m prefopt.score "input=$rows" "output=runs/madpo/scored_$quality.jsonl.gz" "name=rewards_$quality" \
            scorer=reward_model "scorer.path=${model[0]}"
        rows=runs/madpo/scored_$quality.jsonl.gz
    done
    mv "$rows" "$scored"
fi
$python -m prefopt.train "${sweep[@]}" runs_dir=runs/madpo/tuning dataset.format.quality=high seed=100 \
    optimizer.lr=2e-5,5e-5,1e-4 "objective=$methods"
declare -A tuned # the methods by their best learning rate
for method in ${methods//,/ }; do
    lr=$($python -m prefopt.runs runs_dir=runs/madpo/tuning "name=$method-*" best=optimizer.lr)
    tuned[$lr]+=${tuned[$lr]:+,}$method
done
for lr in "${!tuned[@]}"; do
    $python -m prefopt.train "${sweep[@]}" "optimizer.lr=$lr" "objective=${tuned[$lr]}"
done
$python -m prefopt.report runs_dir=runs/madpo/tuning output=results/madpo/tuning
$python -m prefopt.report runs_dir=runs/madpo/final output=results/madpo columns=dataset.format.quality \
    published=results/published/madpo_table_1.csv
