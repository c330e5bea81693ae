#!/usr/bin/env bash
# MMPO's comparison: betas, epochs, ablations. At its auxiliary weight of 1 its beta changes nothing, nor does the
# normalization, of which the one over the step is faster.
. "$(dirname "$0")/_begin.sh"

mmpo=(+sweep=lab/mmpo runs_dir=$lab/mmpo/methods "seed=$seeds")
tune=(+sweep=lab/mmpo runs_dir=$lab/mmpo/tuning exports=1 "${tuning[@]}")
train dpo,simpo "${tune[@]}" objective.beta=0.1
train mmpo "${tune[@]}" objective.beta=0.1 objective.normalization=step
train sft "${tune[@]}"
train_best dpo,simpo $lab/mmpo/tuning "${mmpo[@]}" objective.beta=0.01,0.05,0.1,0.5
train_best mmpo $lab/mmpo/tuning "${mmpo[@]}" objective.beta=0.01,0.5 objective.normalization=step
train_best sft $lab/mmpo/tuning "${mmpo[@]}"
ablation=(+sweep=lab/mmpo runs_dir=$lab/mmpo/ablation exports=1 "seed=0,1")
train_best mmpo $lab/mmpo/tuning "${ablation[@]}" objective.auxiliary_weight=0,0.25,0.5
train_best mmpo $lab/mmpo/tuning "${ablation[@]}" objective.normalization=none
for change in auxiliary_weight=1 entropy_bonus=true length_normalize=true margin=0.8; do
    train_best mmpo $lab/mmpo/tuning "${ablation[@]}" objective.normalization=step "objective.$change"
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
