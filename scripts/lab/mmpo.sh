#!/usr/bin/env bash
# MMPO's comparison: betas, epochs, ablations. At its auxiliary weight of 1 its beta changes nothing, nor does the
# normalization, of which the one over the step is faster.
. "$(dirname "$0")/_begin.sh"

tune=(+sweep=lab/mmpo runs_dir=$lab/mmpo/tuning exports=1 "${tuning[@]}")
train dpo,simpo "${tune[@]}" objective.beta=0.1
train mmpo "${tune[@]}" objective.beta=0.1 objective.normalization=step
train sft "${tune[@]}"
mmpo=(+sweep=lab/mmpo "seed=$seeds" "$(tuned $lab/mmpo/tuning)")
train dpo,simpo "${mmpo[@]}" objective.beta=0.01,0.05,0.1,0.5
train mmpo "${mmpo[@]}" objective.beta=0.01,0.5 objective.normalization=step
train sft "${mmpo[@]}"
ablation=(+sweep=lab/mmpo runs_dir=$lab/mmpo/ablation exports=1 seed=0,1 "$(tuned $lab/mmpo/tuning)")
train mmpo "${ablation[@]}" objective.auxiliary_weight=0,0.25,0.5
train mmpo "${ablation[@]}" objective.normalization=none
for change in auxiliary_weight=1 entropy_bonus=true length_normalize=true margin=0.8; do
    train mmpo "${ablation[@]}" objective.normalization=step "objective.$change"
done
[[ -n $dry ]] && exit

# On a core each.
capability mmpo/methods checkpoints=all &
prefopt alpaca "run=$lab/mmpo/methods/*" checkpoints=all judge=reward_model scorer@judge.scorer=lab \
    instructions=$lab/world/prompts.jsonl.gz split=heldout sampling.temperature=1 "${sampling[@]}" > /dev/null
wait $!
reports mmpo/{tuning,methods,ablation}
prefopt papers paper=mmpo runs_dir=$lab/mmpo/methods output=$results/mmpo/methods
prefopt claims
