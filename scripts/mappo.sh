#!/usr/bin/env bash
# MaPPO in miniature. Offline: each base with and without it, three learning rates at one seed, the best one at three
# other seeds. Online: DPO with and without it in three stages, at the learning rate that was best offline. Called again
# it skips what is finished. `make mappo` calls it; arguments go to every training sweep (launcher.at_once=2).
set -euo pipefail
cd "$(dirname "$0")/.."
python=.venv/bin/python
bases=dpo,simpo,ipo,cpo
sweep=(-m +sweep=mappo "$@")
tuning=(runs_dir=runs/mappo/tuning seed=100 optimizer.lr=2e-5,5e-5,1e-4)
best() { $python -m prefopt.runs runs_dir=runs/mappo/tuning "name=$1-*" best=optimizer.lr; }

$python -m prefopt.train "${sweep[@]}" "${tuning[@]}" "objective=$bases"
$python -m prefopt.train "${sweep[@]}" "${tuning[@]}" objective=mappo "objective/base=$bases"
declare -A plain wrapped # the methods by their best learning rate
for base in ${bases//,/ }; do
    lr=$(best "$base")
    plain[$lr]+=${plain[$lr]:+,}$base
    lr=$(best "mappo_$base")
    wrapped[$lr]+=${wrapped[$lr]:+,}$base
done
for lr in "${!plain[@]}"; do
    $python -m prefopt.train "${sweep[@]}" "optimizer.lr=$lr" "objective=${plain[$lr]}"
done
for lr in "${!wrapped[@]}"; do
    $python -m prefopt.train "${sweep[@]}" "optimizer.lr=$lr" objective=mappo "objective/base=${wrapped[$lr]}"
done
$python -m prefopt.report runs_dir=runs/mappo/tuning output=results/mappo/tuning
$python -m prefopt.report runs_dir=runs/mappo/final output=results/mappo \
    published=results/published/mappo_table_2.csv

# A quarter of the training prompts, so that a stage is one pass over its 32 pairs in four steps.
prompts=runs/mappo/prompts.jsonl
[[ -f $prompts ]] || zcat prefopt/data/sentiment_offline.jsonl.gz | grep '"split": "train"' | head -n 96 > $prompts
stages=(dataset=sentiment_offline scorer=vader "prompts=$prompts" stages=3 steps=4 batch_size=8 eval_every=4
    heldout_pairs=32 runs_dir=runs/mappo/online)
for seed in 0 1 2; do
    $python -m prefopt.online objective=dpo "optimizer.lr=$(best dpo)" "${stages[@]}" "seed=$seed"
    $python -m prefopt.online objective=mappo "optimizer.lr=$(best mappo_dpo)" "${stages[@]}" "seed=$seed"
done
$python -m prefopt.report runs_dir=runs/mappo/online output=results/mappo/online
