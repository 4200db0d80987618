#!/usr/bin/env bash
# All that only a GPU can show, the most telling first, with results in gpu/.
#
#     benchmarks/gpu.sh [DATA]     DATA: pixels that data.py wrote, as of CIFAR-10, to train B/4 on
#
# GPU=cpu SIZE=T/2 BATCHES=4 STEPS=4 tries the script itself on a CPU.
set -u
cd "$(dirname "$0")/.."
SIZE=${SIZE:-XL/2} BATCHES=${BATCHES:-32 128 256} STEPS=${STEPS:-300} OUT=${OUT:-gpu}
mkdir -p "$OUT"

run() {  # run a command, show what it prints and keep it in a file
    echo "== $*" | tee "$OUT/$name.txt"
    timeout "$limit" "$@" 2>&1 | tee -a "$OUT/$name.txt"
}

name=machine limit=60
run python -c "import torch; print(torch.__version__, torch.cuda.is_available() and torch.cuda.get_device_name())"

name=tests limit=300  # does it run, and is it right?
run python -m pytest -q tests/test_gpu.py

for batch in $BATCHES; do  # what does a step cost?
    name=step-$batch limit=300
    run python benchmarks/step.py --size "$SIZE" --batch "$batch" --only ours
done
first=${BATCHES%% *}
name=step-imf limit=300
run python benchmarks/step.py --size "${IMF:-iXL/2}" --batch "$first" --only ours
name=step-authors limit=400
run python benchmarks/step.py --size "$SIZE" --batch "$first" --only authors ours --limit 240
name=step-unet limit=600  # a network that somebody else wrote
run python benchmarks/step.py --size UNet --batch "$first" --only authors ours --limit 240
name=step-cifar10 limit=600  # the paper's other experiment, 128 rows a GPU as its authors have
run python benchmarks/step.py --size "${CIFAR:-cifar10}" --batch "${CIFAR_BATCH:-128}" --only authors ours --limit 240
name=profile limit=200
run python benchmarks/step.py --size "$SIZE" --batch "$first" --only ours --rounds 2 --profile

name=digits limit=400  # how exact is du/dt of a trained network?
run python train.py --steps $((10 * STEPS)) --out "$OUT/digits"
name=derivative limit=120
run python benchmarks/step.py --derivative --weights "$OUT/digits"

name=latents limit=120  # does the loop keep up, and how long does a save take?
run python -c "import sys, pathlib; sys.path[:0] = ['benchmarks', '.']; import loader
path = pathlib.Path('$OUT/latents'); path.mkdir(exist_ok=True); loader.random_latents(path)"
name=loop limit=400
for steps in $((STEPS / 2)) "$STEPS"; do  # the second continues the first
    run python train.py --size "$SIZE" --data "$OUT/latents" --batch "$first" --steps "$steps" --out "$OUT/run"
done
cat "$OUT/run/log.jsonl"

name=evaluation limit=300  # what does an evaluation cost?
run python benchmarks/evaluation.py --seconds "${SECONDS_EACH:-5}"

if [ $# = 1 ]; then  # does it learn?
    name=learn limit=600
    run python train.py --size "${LEARN:-B/4}" --data "$1" --lr 2e-4 --steps "${LEARN_STEPS:-20000}" --out "$OUT/learn"
    name=learn-imf  # in the same time: the limit makes it save and end
    run python train.py --size "${LEARN_IMF:-iB/2}" --data "$1" --batch 256 --lr 2e-4 --steps "${LEARN_STEPS:-20000}" --out "$OUT/learn-imf"
fi
