#!/usr/bin/env bash
# Measure on a GPU what the README's tables have no figure for yet: FPS of both versions at 1024x512,
# a short training in mixed precision on the drawn street scenes, and the speed of pretraining.
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

# Pretraining: images per second and the share of time waiting for data, in each row of log.csv
# (the first epoch starts the workers), over drawn JPEGs of ImageNet's usual size.
test -d data/jpegs || "$python" -c "from datasets.shapes import make_shapes
make_shapes('data/jpegs', {'train': 700, 'val': 50}, size=(375, 500), workers=$(nproc))"
"$python" lednet_imagenet.py --device cuda --datadir data/jpegs --epochs 3 --workers "$(nproc)" \
    --savedir "$out/pretraining" | tee "$out/pretraining.log"
