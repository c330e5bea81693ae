#!/usr/bin/env bash
# All three comparisons at the same time: while one plans its next jobs, those of the others have the cores.
. "$(dirname "$0")/_begin.sh"

here=$lab
[[ -n $dry ]] && here=$(mktemp -d)
[[ " $* " == *launcher.at_once=* || " $* " == *launcher=slurm* ]] || set -- "$@" launcher.at_once=$((($(nproc) + 2) / 3))
set -m # each in a process group of its own: Ctrl-C here reaches its sweep, which lets the jobs save
declare -A scripts=()
trap 'for pid in "${scripts[@]}"; do kill -INT -- "-$pid" 2> /dev/null; done; wait; exit 130' INT TERM
for paper in mappo mmpo madpo; do
    scripts/lab/$paper.sh "$@" > "$here/$paper.log" 2>&1 &
    scripts[$paper]=$!
done
echo "under way; what they say is in $here/*.log"
failed=
for paper in mappo mmpo madpo; do
    wait "${scripts[$paper]}" || { failed=yes; echo "$paper has failed: $here/$paper.log" >&2; }
done
[[ -z $failed ]]
