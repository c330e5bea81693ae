#!/usr/bin/env bash
# MMPO on SmolLM2-135M: each method with three learning rates at one seed, and with the best one at the paper's four betas.
# What this size can show is that MMPO is a likelihood, whatever its beta. With PAIRS and HELDOUT, files of prompt, chosen and
# rejected, each method also trains once on these.
. "$(dirname "$0")/../common.sh"
methods=dpo,simpo,mmpo
runs=runs/mini/mmpo
results=results/mini/mmpo

train $methods +sweep=mini/mmpo "runs_dir=$runs/tuning" seed=100 objective.beta=0.1 optimizer.lr=2e-5,5e-5,1e-4
train $methods +sweep=mini/mmpo "$(tuned $runs/tuning)"
if [[ -n ${PAIRS:-} ]]; then
    train $methods +sweep=mini/mmpo "$(tuned $runs/tuning)" "runs_dir=$runs/real" objective.beta=0.1 \
        dataset=jsonl dataset.name=ultrafeedback "dataset.train=$PAIRS" "dataset.heldout=$HELDOUT" heldout_pairs=null \
        max_prompt_tokens=200 max_completion_tokens=200
fi
[[ -n $dry ]] && exit
prefopt report runs_dir=$runs/tuning output=$results/tuning
[[ ! -d $runs/real ]] || prefopt report runs_dir=$runs/real output=$results/real
prefopt report runs_dir=$runs/final output=$results
