#!/usr/bin/env bash
# Measure on a GPU what the README's table has no figure for yet: FPS of both versions at 1024x512,
# and a short training in mixed precision on the drawn street scenes.
#
#     tools/measure_gpu.sh results/gpu     # a new folder for the figures
set -euo pipefail
out=${1:?give a new folder for the figures}
cd "$(dirname "$0")/.."
python=${PYTHON:-python}
mkdir -p "$out"
for width in 20 128; do
    "$python" eval_cityscapes_server.py --device cuda --apn-channels "$width" \
        --json "$out/speed-d$width.json"
done
"$python" main.py --device cuda --height 256 --batch-size 8 --savedir "$out/run" | tee "$out/train.log"
"$python" eval_cityscapes_server.py --device cuda --checkpoint "$out/run/best.pth" \
    --datadir data/synthetic --json "$out/score.json"
