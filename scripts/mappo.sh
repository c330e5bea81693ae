#!/usr/bin/env bash
# MaPPO offline, in miniature: each base with and without it, three learning rates at one seed, the best one at three
# other seeds. Called again it skips what is finished. `make mappo` calls it.
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
$python -m prefopt.report runs_dir=runs/mappo/tuning output=results/mappo/tuning
$python -m prefopt.report runs_dir=runs/mappo/final output=results/mappo
