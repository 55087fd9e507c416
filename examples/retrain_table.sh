#!/bin/sh
# Retraining compared at equal cost: what each way makes of a dense model in the same number of minutes.
#
#   examples/retrain_table.sh MODEL TEXT TEST WORK [MINUTES] [CASE...]
#
# MODEL    dense model folder         TEXT  to train on          TEST  to measure perplexity on
# WORK     folder for all that is made; called again with the same arguments, what is finished is not made again, and a
#          run that was cut off goes on
# MINUTES  of training for each case (30)
# CASE     some of: dense hold-50 hold-70 hold-80 ce-70 ce-80 lora-50 lora-70 gradual-70 gradual-80 taylor-80 global-80
#          admm-80 (all)
#
# Environment: METHOD of one-shot pruning (sparsegpt) and its CALIBRATION (--samples 128 --seqlen 2048), OPTIONS of every
# retraining (--compile), WINDOW to measure perplexity with (2048).
# It ends with WORK/report: comparison.json, .md and .png.
set -eu
[ $# -ge 4 ] || { sed -n '2,/^set/s/^# \{0,1\}//p' "$0"; exit 2; }
model=$1 text=$2 test=$3 work=$4 minutes=${5:-30}
shift 4
[ $# -eq 0 ] || shift
[ $# -gt 0 ] || set -- dense hold-50 hold-70 hold-80 ce-70 ce-80 lora-50 lora-70 gradual-70 gradual-80 taylor-80 \
    global-80 admm-80
method=${METHOD:-sparsegpt} calibration=${CALIBRATION---samples 128 --seqlen 2048}
options=${OPTIONS---compile} window=${WINDOW:-2048}
mkdir -p "$work"

# The one-shot model at so many per cent of zeros.
pruned() {
    [ -d "$work/oneshot-$1" ] || flash-llm prune "$model" --method "$method" --sparsity "0.$1" --calibration "$text" \
        $calibration --out "$work/oneshot-$1" > /dev/null
    echo "$work/oneshot-$1"
}

# retrained NAME FOLDER OPTION...
retrained() {
    name=$1 folder=$2
    shift 2
    [ -d "$work/$name" ] || flash-llm retrain "$folder" --text "$text" --minutes "$minutes" $options "$@" \
        --out "$work/$name"
}

folders=$model
for case in "$@"; do
    share=${case##*-}
    case $case in
        dense) retrained dense "$model" --dense --teacher "$model" ;;
        hold-*) retrained "$case" "$(pruned "$share")" --teacher "$model" ;;
        ce-*) retrained "$case" "$(pruned "$share")" ;;
        lora-*) retrained "$case" "$(pruned "$share")" --teacher "$model" --lora-rank 16 ;;
        gradual-*) retrained "$case" "$(pruned 50)" --teacher "$model" --sparsity "0.$share" ;;
        taylor-*) retrained "$case" "$(pruned 50)" --teacher "$model" --sparsity "0.$share" --score taylor ;;
        global-*) retrained "$case" "$(pruned 50)" --teacher "$model" --sparsity "0.$share" --score taylor \
            --scope global ;;
        admm-*) retrained "$case" "$model" --teacher "$model" --sparsity "0.$share" --schedule admm --score taylor ;;
        *) echo "unknown case $case" >&2; exit 2 ;;
    esac
    folders="$folders $work/$case"
done
rm -rf "$work/report"
# Folders have no spaces in their names here.
# shellcheck disable=SC2086
flash-llm compare $folders "$work"/oneshot-* --text "$test" --window "$window" --report "$work/report"
