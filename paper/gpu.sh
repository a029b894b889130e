#!/usr/bin/env bash
# All that is asked of one GPU, in nine minutes at most:
#
#     bash paper/gpu.sh [folder of games]        writes into $OUT, or into gpu/ where it is not set
#
# 1. tests.txt    the oracle tests, first epochs and a process group of one, on the GPU
# 2. epochs.txt   seconds, memory and floor of whole epochs, generated vg and tg
# 3. games.txt    test Recall@20 of Random and of MMCPR with graphs alone; on an H200 .179 and .181
# 4. vg.txt       pre-training of generated vg to its best, 100 epochs of fine-tuning
# 5. plain.txt    the fast paths beside the plain definitions, as far as the time goes
#
# Each part is printed as it goes; one that fails or outlasts its limit does not stop the next.
# Of games only interactions.csv and items.csv are read.
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(realpath -m "${OUT:-gpu}")
games=$(realpath -m "${1:-data/games}")
mkdir -p "$out"
tables=$(mktemp -d)
trap 'rm -rf "$tables"' EXIT
export PYTHONUNBUFFERED=1
limit=${LIMIT:-520}  # seconds in all

# part NAME SECONDS COMMAND: runs the command; its output, without progress bars, into NAME.txt too.
part() {
    local name=$1 seconds=$2 left=$((limit - SECONDS))
    shift 2
    (( seconds < left )) || seconds=$left
    (( seconds > 5 )) || { echo "== $name: no time left"; return; }
    echo "== $name, at second $SECONDS: $*" | tee -a "$out/$name.txt"
    timeout --kill-after=5 "$seconds" "$@" 2>&1 | stdbuf -oL tr '\r' '\n' \
        | grep --line-buffered -v '%|' | tee -a "$out/$name.txt"
    echo "== $name: exit status ${PIPESTATUS[0]}, at second $SECONDS" | tee -a "$out/$name.txt"
}

part tests 120 python3 -m pytest -q -k cuda --durations=5 .
part epochs 150 python3 -m paper.bench --device cuda --epochs --data vg tg
mmcpr="python3 mmcpr.py --device cuda"
finetune="python3 finetune.py --device cuda"
part games 120 $finetune --data "$games" --metrics "$out/games_random.json"
part games 60 $mmcpr --data "$games" --modalities G --patience 20 --out "$tables/games.npz"
part games 60 $finetune --init "$tables/games.npz" --scale xavier --metrics "$out/games_mmcpr.json"
part vg 60 python3 -m paper.bench --data vg --write "$tables/vg"
part vg 90 $mmcpr --data "$tables/vg" --patience 20 --out "$tables/vg.npz"
part vg 90 $finetune --init "$tables/vg.npz" --epochs 100 --patience 100
part plain 600 python3 -m paper.bench --device cuda --data vg tg
