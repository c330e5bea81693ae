#!/usr/bin/env bash
# MaPPO on SmolLM2-135M, offline: each base with and without it, three learning rates at one seed, and the best one at two
# other seeds. What this size can show is how far the chosen log-prob falls.
. "$(dirname "$0")/../common.sh"
bases=dpo,simpo,ipo,cpo
methods=$bases,mappo_${bases//,/,mappo_}
runs=runs/mini/mappo
results=results/mini/mappo

train $methods +sweep=mini/mappo "runs_dir=$runs/tuning" seed=100 optimizer.lr=2e-5,5e-5,1e-4
train $methods +sweep=mini/mappo "$(tuned $runs/tuning)"
[[ -n $dry ]] && exit
prefopt report runs_dir=$runs/tuning output=$results/tuning
prefopt report runs_dir=$runs/final output=$results
prefopt papers paper=mappo runs_dir=$runs/final output=$results
