#!/usr/bin/env bash
# MMPO's grid in miniature: each method with three learning rates at one seed, with the best one at the paper's four betas,
# and every fifth of each of these runs evaluated: accuracy on three small tasks, win rate against the initial policy by
# the oracle. Then each method once on pairs that a language model has labelled (UltraFeedback), where these are.
. "$(dirname "$0")/../common.sh"
methods=dpo,simpo,mmpo
runs=runs/mini/mmpo
results=results/mini/mmpo

sweep train +sweep=mini/mmpo "runs_dir=$runs/tuning" exports=1 seed=100 objective.beta=0.1 \
    optimizer.lr=2e-5,5e-5,1e-4 "objective=$methods"
train_best $methods $runs/tuning +sweep=mini/mmpo

# Of each of its 1,000 training pairs that are short enough; PAIRS and HELDOUT are files of prompt, chosen and rejected.
pairs=${PAIRS:-../shared/data/preferences/ultrafeedback_train.jsonl}
heldout=${HELDOUT:-../shared/data/preferences/ultrafeedback_eval.jsonl}
if [[ -f $pairs ]]; then
    train_best $methods $runs/tuning +sweep=mini/mmpo "runs_dir=$runs/real" exports=1 objective.beta=0.1 \
        dataset=jsonl dataset.name=ultrafeedback "dataset.train=$pairs" "dataset.heldout=$heldout" heldout_pairs=null \
        max_prompt_tokens=200 max_completion_tokens=200
else
    echo "left out: $pairs is not there; set PAIRS and HELDOUT to files of labelled pairs"
fi
[[ -n $dry ]] && exit

evaluate_small "$(runs_in $runs/final)" all
prefopt report runs_dir=$runs/tuning output=$results/tuning
[[ ! -d $runs/real ]] || prefopt report runs_dir=$runs/real output=$results/real
prefopt report runs_dir=$runs/final output=$results
prefopt papers paper=mmpo runs_dir=$runs/final output=$results
