#!/usr/bin/env bash
# The objectives that are in none of the three comparisons, at tuned learning rates beside those that are; and GRPO, RLOO and
# RAFT beside DPO and MaPPO online. scripts/lab/mappo.sh comes first: its runs are the others in both tables.
. "$(dirname "$0")/_begin.sh"

methods=alpha_dpo,alpha_po,aot,aot_unpaired,apo_down,apo_zero,arpo_cpo,bco,budget,cal_dpo,discopop,dpo_norm,dpop,exo,f_dpo,gpo
methods+=,ld_dpo,lmpo,madpo,margin_matching,nca,r_dpo,robust_dpo,rrhf,simper,slic,sppo,wpo
tune=(+sweep=lab/objectives runs_dir=$lab/tuning_family "${tuning[@]}")
family=(+sweep=lab/objectives runs_dir=$lab/objectives_family "seed=$seeds")
train $methods "${tune[@]}"
train tdpo "${tune[@]}" reference=resident
train_best $methods $lab/tuning_family "${family[@]}"
train_best tdpo $lab/tuning_family "${family[@]}" reference=resident

groups=(+sweep=lab/online_groups stage_reference=initial)
sweep online "${groups[@]}" objective=grpo,rloo,sft runs_dir=$lab/mappo/tuning_groups "${tuning[@]}"
for method in grpo rloo sft; do
    sweep online "${groups[@]}" objective=$method "seed=$seeds" \
        "optimizer.lr=$(best $lab/mappo/tuning_groups online-$method optimizer.lr)"
done
[[ -n $dry ]] && exit

capability objectives_family tasks=[lab_choice,lab_likelihood]
prefopt report "runs_dir=$lab/objectives*" output=$results/family
prefopt report "runs_dir=$lab/tuning*" output=$results/family/tuning
prefopt report "runs_dir=$lab/mappo/online*" output=$results/mappo/groups
prefopt report runs_dir=$lab/mappo/tuning_groups output=$results/mappo/groups/tuning
