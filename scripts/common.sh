# What the scripts of scripts/lab, scripts/mini and scripts/paper share. Their arguments go to every sweep (launcher=slurm
# launcher.partition=gpu, --dry-run). Called again they skip what is finished and go on with what is not; with --dry-run
# they print the training jobs with an estimate of what these take, and write nothing.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PREFOPT_PYTHON:-.venv/bin/python}
arguments=("$@")
dry=
[[ " $* " == *" --dry-run "* ]] && dry=yes

prefopt() { $python -m "prefopt.$1" "${@:2}"; }           # one program, here
sweep() { prefopt "$1" -m "${@:2}" "${arguments[@]}"; }   # its jobs, where the launcher says
unless_dry() { [[ -n $dry ]] || "$@"; }

# Commands that need nothing of each other: `beside COMMAND` starts one, `joined` waits for all of them, and fails if one
# has. Each is in a process group of its own, which Ctrl-C here reaches: its sweep lets the jobs save.
declare -A started=()
beside() { set -m; "$@" & started[$!]="$*"; set +m; }
joined() {
    local pid failed=
    for pid in "${!started[@]}"; do
        wait "$pid" || { failed=yes; echo "has failed: ${started[$pid]}" >&2; }
    done
    started=()
    [[ -z $failed ]]
}
trap 'for pid in "${!started[@]}"; do kill -INT -- "-$pid" 2> /dev/null; done; wait; exit 130' INT TERM

# Whether jobs go to machines that Slurm has.
on_slurm() { [[ -z $dry && " ${arguments[*]} " =~ \ launcher=([^ ]+) && ${BASH_REMATCH[1]} != local ]]; }
# One job: there, or in this place.
job() { if on_slurm; then sweep "$@"; else prefopt "$@"; fi; }
# A sweep that needs nothing of those before it: there beside them, on this machine after them.
block() { if on_slurm; then beside sweep "$@"; else sweep "$@"; fi; }

# The folders of the runs in $1 whose names begin with $2, for run=.
runs_in() { (shopt -s nullglob; files=("$1/${2:-}"*/record.json); IFS=,; echo "${files[*]%/record.json}"); }

# Train methods $1 (with commas); mappo_BASE and arpo_BASE are plug-ins in a base: objective=mappo objective/base=BASE. The
# rest are further arguments.
train() {
    local method plain=
    declare -A bases=()
    for method in ${1//,/ }; do
        case $method in
            mappo_* | arpo_*) bases[${method%%_*}]+=${bases[${method%%_*}]:+,}${method#*_} ;;
            *) plain+=${plain:+,}$method ;;
        esac
    done
    [[ -z $plain ]] || sweep train "${@:2}" "objective=$plain"
    for method in "${!bases[@]}"; do sweep train "${@:2}" "objective=$method" "objective/base=${bases[$method]}"; done
}

# optimizer.lr=: of the runs in $1 with the job's objective, that of the best one. best_by: what is highest there.
tuned() {
    if [[ -n $dry ]]; then echo optimizer.lr=1e-4; else echo "optimizer.lr=\"\${best:$1,optimizer.lr${best_by:+,$best_by}}\""; fi
}

# The folder of the run of seed $3 among those in $1 whose names begin with $2.
run_of_seed() {
    local record
    # By the indentation: a data format has a seed of its own. That there is none is said below.
    record=$(grep -lE "^    \"seed\": $3," "$1/$2"*/record.json) || true
    [[ $record == */record.json && $record != *$'\n'* ]] ||
        { echo "not one run of seed $3 in $1: ${record:-none}" >&2; return 1; }
    dirname "$record"
}

# The rows of $1 with the scores of the three data qualities' reward models, into $2. The models are the runs in $3 of seed $5
# whose names begin with $4 and the quality. The rest are further arguments.
score_noisy() {
    [[ ! -f $2 ]] || return 0
    local rows=$1 quality next run
    for quality in high medium low; do
        run=$(run_of_seed "$3" "$4-$quality" "$5")
        next=${2%.jsonl.gz}_$quality.jsonl.gz
        job score "input=$rows" "output=$next" "name=rewards_$quality" scorer=reward_model \
            "scorer.path=$run/policy" "${@:6}"
        rows=$next
    done
    mv "$rows" "$2"
}
