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

# The value of key $3 in the best of the runs of method $2 in $1; best_by: what is highest there.
best() {
    if [[ -n $dry ]]; then echo 1e-4; else prefopt runs "runs_dir=$1" "name=$2-*" "best=$3" "by=${best_by:-null}"; fi
}

# The folders of the runs in $1 whose names begin with $2, for run=.
runs_in() { (shopt -s nullglob; files=("$1/${2:-}"*/record.json); IFS=,; echo "${files[*]%/record.json}"); }

# Train methods $1 (with commas); those named mappo_BASE are objective=mappo objective/base=BASE. The rest are further
# arguments.
train() {
    local method plain= wrapped=
    for method in ${1//,/ }; do
        if [[ $method == mappo_* ]]; then wrapped+=${wrapped:+,}${method#mappo_}; else plain+=${plain:+,}$method; fi
    done
    [[ -z $plain ]] || sweep train "${@:2}" "objective=$plain"
    [[ -z $wrapped ]] || sweep train "${@:2}" objective=mappo "objective/base=$wrapped"
}

# The same, each with the learning rate that is best in the runs of $2.
train_best() {
    local method lr
    declare -A methods=() # by their learning rate: one sweep for each
    for method in ${1//,/ }; do
        lr=$(best "$2" "$method" optimizer.lr)
        methods[$lr]+=${methods[$lr]:+,}$method
    done
    for lr in "${!methods[@]}"; do train "${methods[$lr]}" "${@:3}" "optimizer.lr=$lr"; done
}

# The rows of $1/noisy.jsonl.gz with the scores of the three data qualities' reward models, whose runs' names begin with $2:
# $1/scored.jsonl.gz. The rest are further arguments.
score_noisy() {
    [[ ! -f $1/scored.jsonl.gz ]] || return 0
    local rows=$1/noisy.jsonl.gz quality
    for quality in high medium low; do
        prefopt score "input=$rows" "output=$1/noisy_$quality.jsonl.gz" "name=rewards_$quality" \
            scorer=reward_model "scorer.path=$(runs_in "$1/rewards" "$2-$quality")/policy" "${@:3}"
        rows=$1/noisy_$quality.jsonl.gz
    done
    mv "$rows" "$1/scored.jsonl.gz"
}
