#!/usr/bin/env bash
# Measure on a GPU what the README's tables have no figure for yet: FPS of both versions at 1024x512,
# a short training in mixed precision on the drawn street scenes, the speed of the presets, and that
# of pretraining. tools/benchmark.py --device cuda measures the network beside its peers.
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
# The same scores, served in half precision: class_miou of both files should agree to 0.001.
"$python" eval_cityscapes_server.py --device cuda --checkpoint "$out/run/best.pth" \
    --datadir data/synthetic --runtime compiled --precision float16 --json "$out/score-half.json"

# What --preset cityscapes costs: images per second on drawn scenes of Cityscapes' size; 800 epochs
# are 2.38 million images.
test -d data/large || "$python" -c "from datasets.synthetic import make_synthetic
make_synthetic('data/large', {'train': 96, 'val': 2}, height=1024, workers=$(nproc))"
"$python" main.py --device cuda --dataset cityscapes --datadir data/large --preset cityscapes \
    --cache ram --epochs 4 --savedir "$out/cityscapes" | tee "$out/cityscapes.log"

# Pretraining: images per second and the share of time waiting for data, in each row of log.csv, over
# 9,000 drawn JPEGs of ImageNet's usual size. Epochs are 36 steps short, so that the wait for the first
# batch, and in the first epoch the start of the workers, weighs more than it does on ImageNet. The
# published learning rate is too much for six classes, and a run that diverges stops.
test -d data/jpegs || "$python" -c "from datasets.shapes import make_shapes
make_shapes('data/jpegs', {'train': 1500, 'val': 50}, size=(375, 500), workers=$(nproc))"
"$python" lednet_imagenet.py --device cuda --datadir data/jpegs --lr 0.001 --epochs 3 \
    --workers "$(nproc)" --savedir "$out/pretraining" | tee "$out/pretraining.log"
