#!/usr/bin/env bash
# Objectives at tuned learning rates, MaPPO with each base among them; and MaPPO online.
. "$(dirname "$0")/_begin.sh"

methods=dpo,ipo,simpo,cpo,mappo_dpo,mappo_ipo,mappo_simpo,mappo_cpo,beta_dpo,orpo,kto,sft
compared() {
    train $methods +sweep=lab/objectives "$@"
    train mmpo +sweep=lab/objectives "$@" objective.normalization=step # at its auxiliary weight of 1 its default's loss, faster
}
compared runs_dir=$lab/tuning "${tuning[@]}"
compared "seed=$seeds" "$(tuned $lab/tuning)"
sweep online +sweep=lab/online objective=dpo,mappo "seed=$seeds" "$(tuned $lab/tuning)"
[[ -n $dry ]] && exit

capability objectives tasks=[lab_choice,lab_likelihood]
reports tuning objectives mappo/online
prefopt papers paper=mappo runs_dir=$lab/objectives output=$results/objectives
prefopt claims
