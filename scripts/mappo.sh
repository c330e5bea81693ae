#!/usr/bin/env bash
# MaPPO in miniature. Offline: each base with and without it, three learning rates at one seed, the best one at three
# other seeds. Online: DPO with and without it in three stages, at the learning rate that was best offline. Called again
# it skips what is finished. `make mappo` calls it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
for base in dpo simpo ipo cpo; do
    for method in "objective=$base" "objective=mappo objective/base=$base"; do
        name=$base
        [[ $method == *mappo* ]] && name=mappo_$base
        # shellcheck disable=SC2086  # a method is one or two overrides
        $python -m prefopt.train -m +sweep=mappo runs_dir=runs/mappo/tuning seed=100 optimizer.lr=2e-5,5e-5,1e-4 $method
        lr=$($python -m prefopt.runs runs_dir=runs/mappo/tuning "name=$name-*" best=optimizer.lr)
        # shellcheck disable=SC2086
        $python -m prefopt.train -m +sweep=mappo "optimizer.lr=$lr" $method
    done
done
# Half of the training prompts, so that a stage is one pass over its 64 pairs in eight steps.
prompts=runs/mappo/prompts.jsonl
[[ -f $prompts ]] || zcat prefopt/data/sentiment_offline.jsonl.gz | grep '"split": "train"' | head -n 192 > $prompts
for method in dpo "mappo objective/base=dpo"; do
    name=dpo
    [[ $method == mappo* ]] && name=mappo_dpo
    lr=$($python -m prefopt.runs runs_dir=runs/mappo/tuning "name=$name-*" best=optimizer.lr)
    for seed in 0 1 2; do
        # shellcheck disable=SC2086
        $python -m prefopt.online objective=$method dataset=sentiment_offline scorer=vader "prompts=$prompts" stages=3 steps=8 \
            batch_size=8 eval_every=8 heldout_pairs=32 "optimizer.lr=$lr" "seed=$seed" runs_dir=runs/mappo/online
    done
done
$python -m prefopt.report runs_dir=runs/mappo/tuning output=results/mappo/tuning
$python -m prefopt.report runs_dir=runs/mappo/final output=results/mappo
$python -m prefopt.report runs_dir=runs/mappo/online output=results/mappo/online
