#!/usr/bin/env bash
# Objectives at tuned learning rates, MaPPO with each base among them; and MaPPO online.
. "$(dirname "$0")/_begin.sh"

methods=dpo,ipo,simpo,cpo,mappo_dpo,mappo_ipo,mappo_simpo,mappo_cpo,beta_dpo,mmpo,orpo,kto,sft
train $methods +sweep=lab/objectives runs_dir=$lab/tuning "${tuning[@]}"
train_best $methods $lab/tuning +sweep=lab/objectives "seed=$seeds"
sweep online +sweep=lab/online objective=dpo "optimizer.lr=$(best $lab/tuning dpo optimizer.lr)" "seed=$seeds"
sweep online +sweep=lab/online objective=mappo "optimizer.lr=$(best $lab/tuning mappo_dpo optimizer.lr)" "seed=$seeds"
[[ -n $dry ]] && exit

capability objectives tasks=[lab_choice,lab_likelihood]
reports tuning objectives mappo/online
prefopt papers paper=mappo runs_dir=$lab/objectives output=$results/objectives
prefopt claims
