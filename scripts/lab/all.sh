#!/usr/bin/env bash
# All three comparisons at the same time: while one plans its next jobs, those of the others have the cores.
. "$(dirname "$0")/_begin.sh"

here=$lab
[[ -n $dry ]] && here=$(mktemp -d)
experiments() { "scripts/lab/$1.sh" "${@:2}" > "$here/$1.log" 2>&1; }
echo "under way; what they say is in $here/*.log"
for paper in mappo mmpo madpo; do beside experiments $paper "${arguments[@]}"; done
joined
