#!/usr/bin/env bash
# The objectives that are in none of the three comparisons, at tuned learning rates beside those that are; and GRPO, RLOO and
# RAFT beside DPO and MaPPO online. scripts/lab/mappo.sh comes first: its runs are the others in both tables.
. "$(dirname "$0")/_begin.sh"

methods=alpha_dpo,alpha_po,aot,aot_unpaired,apo_down,apo_zero,arpo_cpo,bco,budget,cal_dpo,discopop,dpo_norm,dpop,exo,f_dpo,gpo
methods+=,ld_dpo,lmpo,madpo,margin_matching,nca,r_dpo,robust_dpo,rrhf,simper,slic,sppo,wpo
compared() {
    train $methods +sweep=lab/objectives "$@"
    train tdpo +sweep=lab/objectives "$@" reference=resident
}
compared runs_dir=$lab/tuning_family "${tuning[@]}"
compared runs_dir=$lab/objectives_family "seed=$seeds" "$(tuned $lab/tuning_family)"
online=(+sweep=lab/online_groups objective=grpo,rloo,sft stage_reference=initial)
sweep online "${online[@]}" runs_dir=$lab/mappo/tuning_groups "${tuning[@]}"
sweep online "${online[@]}" "seed=$seeds" "$(tuned $lab/mappo/tuning_groups)"
[[ -n $dry ]] && exit

capability objectives_family tasks=[lab_choice,lab_likelihood]
prefopt report "runs_dir=$lab/objectives*" output=$results/family
prefopt report "runs_dir=$lab/tuning*" output=$results/family/tuning
prefopt report "runs_dir=$lab/mappo/online*" output=$results/mappo/groups
prefopt report runs_dir=$lab/mappo/tuning_groups output=$results/mappo/groups/tuning
